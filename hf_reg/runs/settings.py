"""The settings of a recipe as objects: arguments, adapter, patches, penalties; neither model nor data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from ..names import nearest
from ..resuming import last_checkpoint
from .errors import RecipeError, refused_as_recipe
from .recipe import Recipe
from .sections import check_keys, check_value


__all__ = ["Settings", "make_settings"]

ADAPTERS = {
    "lora": "peft:LoraConfig", "sorsa": "hf_reg.adapters:SorsaConfig", "balora": "hf_reg.adapters:BALoraConfig"
}  # fmt: skip
IMPLIED = {  # of adapters: the task and the model say it
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config",
}  # fmt: skip
ELSEWHERE = {  # training arguments that a recipe says in another way
    "patches": "it has a section of its own, at the top of the recipe",
    "penalties": "it has a section of its own, at the top of the recipe",
    "resume_from_checkpoint": "write resume: true, or resume: FOLDER",
    "do_train": "a recipe always trains",
    "do_eval": "a recipe evaluates where data.eval is given",
    "do_predict": "a recipe does not predict",
    "hub_token": "a recipe is written beside the model; log in with `hf auth login` or set HF_TOKEN",
}


@dataclass(frozen=True)
class Settings:
    """What a recipe says, checked: `args` of the task's class, `adapter` as PEFT's configuration, [`Patch`] and
    [`Penalty`] objects (those of the adapter included), and the folder of the checkpoint to go on from."""

    args: Any
    adapter: Any
    patches: list[Any]
    penalties: list[Any]
    checkpoint: str | None


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _check_fields(cls: type, given: Mapping[str, Any], where: str, own: tuple[str, ...], without: set[str]) -> None:
    check_keys(given, [*own, *(f.name for f in fields(cls) if f.init and f.name not in without)], where)
    hints = get_type_hints(cls)
    for key, value in given.items():
        if key not in own:
            check_value(value, hints[key], f"{where}.{key}")


def _adapter(recipe: Recipe) -> Any:
    spec = recipe.adapter
    spec = {"type": spec} if isinstance(spec, str) else dict(spec or {"type": "none"})
    kind = spec.pop("type", None)
    if kind == "none" and not spec:
        return None
    if not isinstance(kind, str) or kind not in ADAPTERS:
        found = "missing." if kind is None else f"{kind!r} is not known.{nearest(kind, list(ADAPTERS))}"
        found = f"none takes no {', '.join(spec)}." if kind == "none" else found
        raise RecipeError(f"adapter.type: {found} Give one of {', '.join(ADAPTERS)}, none.")
    cls = _imported(ADAPTERS[kind])
    _check_fields(cls, spec, "adapter", (), IMPLIED)
    with refused_as_recipe("adapter"):
        return cls(task_type=recipe.PEFT_TYPE, **spec)


def _checkpoint(train: Mapping[str, Any]) -> str | None:
    folder, resume = str(train["output_dir"]), train.get("resume", False)
    if isinstance(resume, str):
        if not (Path(resume) / "trainer_state.json").is_file():
            raise RecipeError(
                f"train.resume: {resume!r} is no checkpoint. Give a folder checkpoint-N of an earlier run."
            )
        return resume
    last = last_checkpoint(Path(folder))
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # the launcher began anew after a failure
        return last
    if resume and last is None:
        raise RecipeError(f"train.resume: there is no checkpoint in {folder!r}. Leave resume out to start anew.")
    if not resume and last is not None:
        raise RecipeError(
            f"train.output_dir: {last!r} is left of an earlier run. Go on from it with --resume, or give another "
            "output_dir."
        )
    return last


def make_settings(recipe: Recipe) -> Settings:
    """The settings of `recipe`.

    Raises:
        [`RecipeError`]: for packages that are missing, unknown fields, values of another type, and whatever the
            classes that take them refuse.
    """
    absent = [package for module, package in recipe.PACKAGES.items() if find_spec(module) is None]
    if absent:
        raise RecipeError(f"{' and '.join(absent)} is not installed, which task {recipe.TASK} needs: "
                          'pip install "hf_reg[train]".')  # fmt: skip
    train = recipe.train
    if wrong := next((key for key in train if key in ELSEWHERE), None):
        raise RecipeError(f"train.{wrong}: has no place here; {ELSEWHERE[wrong]}.")
    check_value(train.get("resume", False), bool | str, "train.resume")
    cls = _imported(recipe.ARGUMENTS)
    _check_fields(cls, train, "train", ("resume",), set(ELSEWHERE))
    checkpoint = _checkpoint(train)
    from ..recipes import make_companions, make_patches, make_penalties

    with refused_as_recipe("patches"):
        patches = make_patches(recipe.patches)
    with refused_as_recipe("penalties"):
        penalties = make_penalties(recipe.penalties)
    with refused_as_recipe("train.companions"):
        make_companions(train.get("companions"))
    adapter = _adapter(recipe)
    given = {key: value for key, value in train.items() if key != "resume"}
    with refused_as_recipe("train"):  # last: it may start the communication of processes
        args = cls(**given, patches=recipe.patches, penalties=recipe.penalties)
    if args.eval_strategy != "no" and recipe.data.eval is None:
        raise RecipeError(f"train.eval_strategy: {args.eval_strategy.value!r}, but there is no data.eval. Give it.")
    with refused_as_recipe("adapter"):
        brought = adapter.penalties("default", args.learning_rate) if hasattr(adapter, "penalties") else []
    return Settings(args, adapter, patches, [*penalties, *brought], checkpoint)
