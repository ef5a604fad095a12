"""What `hf-reg train` prints: the loss and settings of a recipe, and the metrics of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .recipe import Recipe
from .settings import Settings


__all__ = ["metrics_table", "plan_table"]


def _table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def _fields(given: Any) -> str:
    own = {key: value for key, value in given.items() if key != "type"} if isinstance(given, Mapping) else {}
    return ", ".join(f"{key}={value!r}" for key, value in own.items())


def plan_table(recipe: Recipe, settings: Settings) -> Table:
    """What is trained, on what, and with which loss."""
    adapter = f"{type(settings.adapter).__name__}({_fields(recipe.adapter)})" if settings.adapter is not None else ""
    rows = [("task", f"{recipe.TASK}, {type(settings.args).__name__}"), *recipe.models().items()]
    rows += [("adapter", adapter or "none: the whole model is trained")]
    rows += [("loss", getattr(settings.args, "formula", recipe.LOSS))]
    rows += [(f"+ {penalty.name}", f"{penalty.weight:g} * {penalty!r}") for penalty in settings.penalties]
    rows += [("patch", repr(patch)) for patch in settings.patches]
    for key in ("train", "eval"):
        place = getattr(recipe.data, key)
        rows.append((f"{key} data", recipe.data.shown(place) if place else "none"))
    rows += [("metric", f"{one.filed}, from {one.script or 'the Hub'}") for one in getattr(recipe, "metrics", ())]
    rows += [("output", str(settings.args.output_dir)), ("starts from", settings.checkpoint or "the beginning")]
    table = _table("", "what this recipe does")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """The final metrics by name."""
    table = _table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, (int, float)) else str(value))
    return table
