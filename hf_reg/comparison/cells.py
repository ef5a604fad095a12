"""Cells: a method with its settings, trained on a number of examples under a seed; and what identifies one."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_reg import __version__

from ..runs.errors import refused_as_run
from .plan import Plan
from .samples import Samples


__all__ = ["Cell", "digest", "grid_of", "setting_of_all", "study_key", "tuning_size", "versions"]

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "datasets", "numpy")


@dataclass(frozen=True)
class Cell:
    """One run of the grid; `key` is a digest of all that determines its numbers."""

    key: str
    method: str
    size: int
    seed: int
    settings: dict[str, Any]


def digest(value: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    return {"hf_reg": __version__, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _of_model(place: str, revision: str | None) -> str:
    """A digest of the files in a folder, or the commit on the Hub."""
    folder = Path(place)
    if not folder.is_dir():
        from transformers import AutoConfig

        with refused_as_run(f"model {place} cannot be loaded"):
            return str(AutoConfig.from_pretrained(place, revision=revision or "main")._commit_hash)
    found = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"):
        found.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def _device(plan: Plan) -> str:
    import torch

    if plan.recipe.train.get("use_cpu") or not torch.accelerator.is_available():
        return f"cpu {platform.machine()}"
    return (
        str(torch.cuda.get_device_name())
        if torch.cuda.is_available()
        else str(torch.accelerator.current_accelerator())
    )


def setting_of_all(plan: Plan) -> dict[str, Any]:
    """What determines the numbers of every method alike, but for the data."""
    from ..yaml_text import load_yaml

    recipe = load_yaml(plan.run_recipe(NOTHING, "", 0).resolved())
    data = {key: value for key, value in recipe["data"].items() if key not in ("train", "eval")}
    model = _of_model(plan.recipe.model.place, plan.recipe.model.revision)
    other = getattr(plan.recipe, "ref_model", None)
    return {
        "recipe": recipe | {"data": data}, "model": model, "device": _device(plan), "versions": versions(),
        "ref_model": _of_model(other.place, other.revision) if other else None,
        "threads": plan.compare.threads, "evaluate_every": plan.compare.evaluate_every,
    }  # fmt: skip


NOTHING: Mapping[str, Any] = {"adapter": None, "patches": None, "penalties": None, "train": {}}


def grid_of(
    plan: Plan, samples: Samples, shared: Mapping[str, Any], tuned: Mapping[str, dict[str, Any]]
) -> list[Cell]:
    """The cells of the comparison, seed by seed, so that whatever is finished is paired.

    Args:
        tuned (mapping): settings by method; methods that are not in it have no cells.
    """
    cells = []
    for seed in plan.compare.every_seed:
        for size in map(samples.count, plan.compare.sizes):
            for method, settings in tuned.items():
                known = {"all": shared, "data": samples.fingerprint, "method": method, "settings": settings}
                key = digest(known | {"size": size, "seed": seed})
                cells.append(Cell(key, method, size, seed, settings))
    return cells


def study_key(plan: Plan, samples: Samples, shared: Mapping[str, Any], method: str) -> str:
    """What determines every trial of a method's search."""
    tuning, own = plan.compare.tuning, plan.methods[method]
    assert tuning is not None
    known = {"all": shared, "data": samples.validation_fingerprint, "settings": plan.settings(method)}
    searched = {
        "search": own.search,
        "seeds": tuning.seeds,
        "trials": tuning.trials,
        "size": tuning_size(plan, samples),
    }
    return digest(known | searched | {"method": method, "optuna": version("optuna")})


def tuning_size(plan: Plan, samples: Samples) -> int:
    """How many labelled examples a trial has: by default the middle size of the comparison."""
    tuning = plan.compare.tuning
    assert tuning is not None
    sizes = sorted(map(samples.count, plan.compare.sizes))
    return samples.count(tuning.size) if tuning.size is not None else sizes[len(sizes) // 2]
