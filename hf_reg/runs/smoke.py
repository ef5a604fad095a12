"""Smoke runs of recipes: with a tiny random model and generated rows, to see in seconds that a recipe goes through."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .recipe import BARE, put
from .stand_ins import family_of, rows_of, save_stand_in


__all__ = ["SMOKE", "smoke_run", "smoke_tree"]

SMOKE = (
    "SMOKE RUN: a tiny random model, generated rows and two steps stand for those of the recipe. It shows that the "
    "recipe goes through and nothing else; no number of it means anything, and nothing is kept."
)
STEPS = 2  # all choices here are ours
WIDTH = 64  # or the next multiple that an adapter's rank fits into
LONGEST = 512  # tokens, unless the recipe has longer texts
HARDWARE = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval")
COMPARED = {"sizes": [8], "seeds": 2, "cost_steps": 2, "evaluate_every": 1}
SEARCHED = {"trials": 2, "size": 8, "validation": 6}


def _adapters(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The adapter of a recipe, and those of the methods that it compares."""
    compare = tree.get("compare")
    methods = compare.get("methods") if isinstance(compare, Mapping) else None
    for one in (tree, *(methods.values() if isinstance(methods, Mapping) else ())):
        if isinstance(one, Mapping) and isinstance(one.get("adapter"), Mapping):
            yield one["adapter"]


def _most(least: int, values: Any) -> int:
    return max([least, *(one for one in values if isinstance(one, int))])


def _replace_models(tree: dict[str, Any], folder: Path) -> None:
    from transformers import set_seed
    from transformers.utils import logging

    name = tree["model"].get("name") if isinstance(tree["model"], Mapping) else tree["model"]
    width = -(-_most(WIDTH, (one.get("r") for one in _adapters(tree))) // WIDTH) * WIDTH
    longest = _most(LONGEST, (tree["train"].get("max_length"), tree["data"].get("max_tokens")))
    set_seed(0)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        save_stand_in(folder, family_of(tree["task"], str(name)), width, longest)
    finally:
        logging.set_verbosity(verbosity)
    for key in ("model", "ref_model"):
        if tree.get(key) is not None:
            put(tree, f"{key}.{BARE[key]}", str(folder), "--smoke")
            for own in ("revision", "attn_implementation"):
                tree[key].pop(own, None)


def _replace_data(tree: dict[str, Any], folder: Path) -> None:
    data = tree["data"]
    columns = [*(data.get("columns") or {}), *(["prompt"] if data.get("template") else [])]
    rows = "".join(json.dumps(row) + "\n" for row in rows_of(tree["task"], columns))
    for key in ("train", "eval"):
        if data.get(key) is not None:
            data[key] = str(folder / f"{key}.jsonl")
            Path(data[key]).write_text(rows, encoding="utf-8")
    for key in ("name", "config", "revision", "package"):
        data.pop(key, None)
    data["columns"] = {key: key for key in data.get("columns") or {}}


def _shorten(tree: dict[str, Any], folder: Path) -> None:
    from torch import accelerator

    without = {"push_to_hub", "resume", *(() if accelerator.is_available() else HARDWARE)}
    tree["train"] = {key: value for key, value in tree["train"].items() if key not in without} | {
        "output_dir": str(folder), "max_steps": STEPS, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    if isinstance(metrics := tree.get("metrics"), list):  # others are on the Hub
        names = [one.get("name") if isinstance(one, Mapping) else one for one in metrics]
        tree["metrics"] = [one for one, name in zip(metrics, names, strict=True) if Path(str(name)).exists()]
    if isinstance(compare := tree.get("compare"), dict):
        tree["compare"] = {key: value for key, value in compare.items() if key not in ("probe", "folder")} | COMPARED
        if isinstance(tuning := compare.get("tuning", {}), Mapping):
            tree["compare"]["tuning"] = {**tuning, **SEARCHED}


def smoke_tree(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The plain values of a recipe as those of a smoke run.

    Replaced are the models by a tiny random one (of an architecture that the name tells, and else of a usual one of
    the task), the data by generated rows with the same columns, the budget by two steps, and where results go. Reports
    to services, pushes, metrics of the Hub, and where there is no accelerator, half precision are left out. All else
    stays: adapter, patches, penalties, schedules, batches.

    Args:
        tree (`dict`): of a recipe that is right; it is changed.
        folder (`Path`): an empty one, for model, data and results.
    """
    for replace, place in ((_replace_models, "model"), (_replace_data, "."), (_shorten, "out")):
        replace(tree, folder / place)
    return tree


@contextmanager
def smoke_run(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same in a folder that goes when the run ends; a tree that is no recipe comes back as it is, for whoever
    reads it to say what is wrong."""
    from .tasks import TASKS

    right = tree.get("task") in TASKS and isinstance(tree.get("model"), (str, Mapping))
    right = right and all(isinstance(tree.get(key), Mapping) for key in ("train", "data"))
    if not right or not isinstance(tree["data"].get("columns") or {}, Mapping):
        yield tree
        return
    with TemporaryDirectory(prefix="hf-reg-smoke-") as folder:
        yield smoke_tree(tree, Path(folder))
