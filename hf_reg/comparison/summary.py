"""What finished cells and measured costs say: `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import log
from statistics import mean, stdev
from typing import Any

from .cells import Cell
from .plan import Plan
from .statistics import differences, fewest_seeds, interval
from .tasks import MEASURES


__all__ = ["measures_of", "summarize"]

NEAR = 0.1  # of a range; we chose it


def measures_of(plan: Plan, found: Sequence[str]) -> list[dict[str, Any]]:
    """What is summarized of what was measured: the task's metrics and the recipe's, then what every task has."""
    compare, facts = plan.compare, plan.facts
    filed = tuple(f"{one.filed}/" for one in getattr(plan.recipe, "metrics", ()))
    names = [name for name in facts.metrics if name in found]
    names += [name for name in found if name.startswith(filed) and name not in names] if filed else []
    if compare.metric is not None and compare.metric in found:
        names = [compare.metric, *(name for name in names if name != compare.metric)]
    lower = (*compare.lower_is_better, *(name for name, higher in facts.metrics.items() if not higher), *MEASURES)
    names += [name for name in MEASURES if name in found and name not in names]
    return [{"name": name, "label": MEASURES.get(name, name), "higher_is_better": name not in lower} for name in names]


def summarize(
    plan: Plan,
    cells: Sequence[Cell],
    records: Mapping[str, Mapping[str, Any]],
    costs: Sequence[Mapping[str, Any]],
    tuned: Mapping[str, Mapping[str, Any]],
    studies: Sequence[str],
    versions: Mapping[str, str],
    planned: int,
) -> dict[str, Any]:
    """What the statistics say; its schema is in the documentation of the results.

    Args:
        cells (sequence of [`Cell`]): of this comparison.
        records (mapping): what is in `cells.jsonl`, by key.
        costs (sequence): what is in `costs.jsonl`.
        tuned (mapping): settings that the search found, by method.
        studies (sequence of `str`): the keys of the searches.
        planned (`int`): how many cells there would be if nothing had failed.
    """
    compare = plan.compare
    done = [(cell, records[cell.key]) for cell in cells if cell.key in records]
    sizes = sorted({cell.size for cell in cells})
    names = {name: None for _, record in done for name, value in record["measures"].items() if value is not None}
    measures = measures_of(plan, list(names))
    rows, seeds = [], []
    for size in sizes:
        for measure in measures:
            values: dict[str, dict[int, float]] = {}
            for cell, record in done:
                value = record["measures"].get(measure["name"])
                if cell.size == size and value is not None:
                    values.setdefault(cell.method, {})[cell.seed] = value
            higher = measure["higher_is_better"]
            found = differences(values, compare.reference, alpha=compare.alpha, higher_is_better=higher)
            for method, own in values.items():
                difference = asdict(found[method]) if method in found else None
                rows.append({"method": method, "size": size, "measure": measure["name"], **_spread(list(own.values())),
                             "difference": difference})  # fmt: skip
            base = set(values.get(compare.reference, {}))
            seeds += [len(base & set(own)) for method, own in values.items() if method in found]
    labels = [
        {
            "name": name, "label": method.label or name, "settings": plan.settings(name),
            "tuned": dict(tuned[name]) if name in tuned else None,
        }
        for name, method in plan.methods.items()
    ]  # fmt: skip
    metric = measures[0] if measures else {"name": next(iter(plan.facts.metrics)), "higher_is_better": True}
    return {
        "schema": 1, "task": plan.recipe.TASK, "model": plan.recipe.model.name,
        "metric": {key: metric[key] for key in ("name", "higher_is_better")}, "reference": compare.reference,
        "sizes": sizes, "seeds": compare.every_seed, "alpha": compare.alpha, "methods": labels, "measures": measures,
        "rows": rows, "costs": [{key: one[key] for key in ("method", "ratio", "low", "high")} for one in costs],
        "versions": dict(versions),
        "keys": [*(cell.key for cell, _ in done), *dict.fromkeys(one["key"] for one in costs), *studies],
        "cells": len(done), "missing": planned - len(done),
        "notes": [*_notes(plan, min(seeds, default=0)), *_at_the_end(plan, tuned)],
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, Any]:
    low, high = interval(values)
    return {
        "n": len(values), "mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "low": low,
        "high": high,
    }  # fmt: skip


def _at_the_end(plan: Plan, tuned: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Settings found within a tenth of a range from its end, beyond which a method may do better; 0 is no such end."""
    notes = []
    for name, params in tuned.items():
        for key, value in params.items():
            one = plan.methods[name].ranges[key]
            if one.low is None or one.high is None:  # choices
                continue
            low, high, at = (log(x) if one.log else x for x in (one.low, one.high, value))
            near_low, near_high = (at - low < NEAR * (high - low) and one.low != 0), high - at < NEAR * (high - low)
            if near_low or near_high:
                notes.append(
                    f"{plan.methods[name].label or name}: the best {key} found, {value:.3g}, is near the end of what "
                    f"was searched, {one.low:.3g} to {one.high:.3g}. Widen compare.methods.{name}.search."
                )
    return notes


def _notes(plan: Plan, seeds: int) -> list[str]:
    """How the verdicts are to be read, and what they cannot show."""
    family, alpha = len(plan.methods) - 1, plan.compare.alpha
    notes = [
        f"Verdicts: sign-flip test of the differences to {plan.compare.reference} under the same seeds, corrected by "
        f"Holm over the {family} other methods for each size and measure; below {alpha:g} counts. Intervals: 95 %, "
        "bootstrap."
    ]
    needed = fewest_seeds(max(family, 1), alpha)
    if not seeds:
        notes.append(f"Nothing is compared: no method shares a finished seed with {plan.compare.reference}.")
    elif seeds < needed:
        notes.append(
            f"With {seeds} seeds the test cannot show any difference between {family + 1} methods, however large "
            f"(its smallest p-value is {min(2.0 ** (1 - seeds), 1.0):.2g}); it needs {needed} seeds or more."
        )
    if plan.compare.tuning is None:
        notes.append("Methods ran at their defaults; none was tuned.")
    return notes
