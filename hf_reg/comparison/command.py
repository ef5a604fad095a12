"""`hf-reg compare`: the plan of a comparison, or the comparison itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..json_lines import Lines
from ..runs.recipe import read_tree
from ..runs.smoke import SMOKE, smoke_run
from ..tables import Shown, terminal
from .comparing import run_plan
from .plan import Plan, read_plan
from .progress import duration
from .result import Comparison
from .statistics import fewest_seeds


__all__ = ["PlanTable", "compare_from"]

INTERRUPTED = 130  # of a shell: 128 and the number of SIGINT


@dataclass
class PlanTable(Shown):
    """What a comparison would run."""

    plan: Plan
    failures: tuple[()] = ()

    def as_json(self) -> dict[str, Any]:
        return {**self._counts(), "estimate_s": self._seconds(), "recipe": self.plan.tree()}

    def _counts(self) -> dict[str, int]:
        compare, methods = self.plan.compare, len(self.plan.methods)
        trials = compare.tuning.trials * methods if compare.tuning is not None else 0
        return {"cells": methods * len(compare.sizes) * len(compare.every_seed), "trials": trials}

    def _seconds(self) -> float | None:
        """By the finished cells in the folder, which need not be of this very plan; without any it is unknown."""
        times = [one["seconds"] for one in Lines(self.plan.folder / "times.jsonl").read()]
        counts, tuning = self._counts(), self.plan.compare.tuning
        runs = counts["cells"] + counts["trials"] * (len(tuning.seeds) if tuning is not None else 0)
        return median(times) * runs / self.plan.processes if times else None

    def _table(self) -> RenderableType:
        plan, compare, counts = self.plan, self.plan.compare, self._counts()
        table = Table("method", "what it does", *(["searched"] if compare.tuning else []), box=box.SIMPLE_HEAD,
                      pad_edge=False)  # fmt: skip
        for name, method in plan.methods.items():
            given = {key: value for key, value in plan.settings(name).items() if value not in (None, {})}
            told = ", ".join(f"{key} {value}" for key, value in given.items()) or "the model as it is"
            table.add_row(name, Text(told), *([Text(", ".join(method.ranges))] if compare.tuning else []))
        seconds, sizes, tuning = self._seconds(), compare.sizes, compare.tuning
        searched = f"{tuning.trials} trials of each method, under {len(tuning.seeds)} seeds" if tuning else "none"
        rows = {
            "task": f"{plan.recipe.TASK}, {plan.recipe.model.name}",
            "sizes": ", ".join(f"{size:.0%} of the data" if size.__class__ is float else str(size) for size in sizes),
            "seeds": ", ".join(map(str, compare.every_seed)),
            "reference": compare.reference,
            "search": searched,
            "cells": f"{counts['cells']}, and {counts['trials']} trials, on {plan.processes} processes",
            "time": f"about {duration(seconds)} from the start, by the cells in the folder" if seconds else
                    "not known before a cell is finished; then it is told",
            "folder": str(plan.folder),
        }  # fmt: skip
        plain = Table("", "what this recipe compares", box=box.SIMPLE_HEAD, pad_edge=False)
        for key, value in rows.items():
            plain.add_row(key, Text(value))
        needed = fewest_seeds(max(len(plan.methods) - 1, 1), compare.alpha)
        few = len(compare.every_seed) < needed
        warning = (
            [Text(f"No difference can be shown with so few seeds; give {needed} or more.", style="red")] if few else []
        )
        return Group(plain, table, *warning)


def compare_from(
    path: Path, changes: Sequence[str] = (), *, check: bool, quiet: bool, smoke: bool = False
) -> Comparison | PlanTable:
    """`hf-reg compare`: with `check`, what would be run; else run it, with `smoke` on what stands for model and data.

    Args:
        quiet (`bool`): progress goes to standard error, which is not read as JSON.
    """
    console = Console(stderr=True) if quiet else terminal()
    if smoke:
        with smoke_run(read_tree(path, changes)) as tree:
            console.print(Text(SMOKE, style="bold"), soft_wrap=True)
            return _compare(path, read_plan(tree), console, check=check)
    return _compare(path, read_plan(path, changes), console, check=check)


def _compare(path: Path, plan: Plan, console: Console, *, check: bool) -> Comparison | PlanTable:
    if check:
        return PlanTable(plan)
    try:
        return run_plan(plan, console)
    except KeyboardInterrupt:
        text = f"hf-reg compare {path}: stopped. What is finished is in {plan.folder}; the same command goes on."
        Console(stderr=True).print(text, style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
