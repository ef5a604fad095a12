"""The folder of a comparison, read: its JSON lines and its summary, and whether they belong together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isclose
from pathlib import Path
from statistics import mean
from typing import Any

from ..json_lines import Lines
from ..json_text import read_json
from ..names import nearest, shown
from ..runs.errors import RunError


__all__ = ["VERDICTS", "Results", "read_results"]

SCHEMA = 1
SUMMARY, CELLS, COSTS, TRIALS = "summary.json", "cells.jsonl", "costs.jsonl", "trials.jsonl"
VERDICTS = ("better", "worse", "no difference shown")
AGAIN = "Run `hf-reg compare` on the folder again: it computes only what is missing, and the summary anew."
NEEDED = {  # of each kind of object
    SUMMARY: ("task", "model", "metric", "reference", "sizes", "seeds", "alpha", "methods", "measures", "rows",
              "missing", "notes"),
    CELLS: ("method", "size", "seed", "measures", "history"),
    COSTS: ("method", "ratio", "low", "high"),
    TRIALS: ("method", "number", "params", "state"),
}  # fmt: skip


def _check(value: Any, kind: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}; expected a JSON object.")
    if value.get("schema") != SCHEMA:
        raise ValueError(
            f"{where} has schema {shown(value.get('schema'))}; this version of hf_reg reads schema {SCHEMA}."
        )
    if lacking := [name for name in NEEDED[kind] if name not in value]:
        raise ValueError(f"{where} has no {lacking[0]!r}; it has {', '.join(map(repr, value))}.")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that was cut off while it was written does not count."""
    try:
        found = Lines(path).read()
    except RunError as error:
        raise ValueError(f"{error} {AGAIN}") from error
    return [_check(value, path.name, f"{path}, line {number}") for number, value in enumerate(found, start=1)]


@dataclass(frozen=True)
class Results:
    """A comparison as its folder has it; [`read_results`] makes one.

    Attributes:
        folder (`Path`): where it was read.
        summary (`dict`): summary.json.
        cells, costs, trials (`list` of `dict`): the lines of cells.jsonl, costs.jsonl and trials.jsonl.
    """

    folder: Path
    summary: dict[str, Any]
    cells: list[dict[str, Any]]
    costs: list[dict[str, Any]]
    trials: list[dict[str, Any]]

    @property
    def reference(self) -> str:
        return self.summary["reference"]

    @cached_property
    def methods(self) -> list[str]:
        """The names, that of the reference first."""
        names = [method["name"] for method in self.summary["methods"]]
        return sorted(names, key=lambda name: name != self.reference)

    @cached_property
    def labels(self) -> dict[str, str]:
        """What people read for each name."""
        return {method["name"]: method.get("label") or method["name"] for method in self.summary["methods"]}

    @cached_property
    def measures(self) -> dict[str, dict[str, Any]]:
        """The measures by name, that of the task first."""
        first = self.summary["metric"]["name"]
        found = {measure["name"]: measure for measure in self.summary["measures"]}
        return dict(sorted(found.items(), key=lambda item: item[0] != first))

    @cached_property
    def sizes(self) -> list[int]:
        return sorted(self.summary["sizes"])

    @cached_property
    def rows(self) -> dict[tuple[str, int, str], dict[str, Any]]:
        """The rows by method, size and measure."""
        return {(row["method"], row["size"], row["measure"]): row for row in self.summary["rows"]}

    def measure(self, name: str | None) -> str:
        """`name` if there is such a measure; the metric of the task for `None`.

        Raises:
            `ValueError`: names those that are there.
        """
        if name is None:
            return self.summary["metric"]["name"]
        if name not in self.measures:
            known = list(self.measures)
            raise ValueError(f"No measure {name!r}.{nearest(name, known)} Measures: {', '.join(known)}.")
        return name

    def size(self, size: int | None) -> int:
        """`size` if there is such a one; the largest for `None`.

        Raises:
            `ValueError`: names those that are there.
        """
        if size is None:
            return self.sizes[-1]
        if size not in self.sizes:
            raise ValueError(f"No size {size}. Sizes: {', '.join(map(str, self.sizes))}.")
        return size

    def cells_of(self, method: str, size: int) -> list[dict[str, Any]]:
        """The cells of a method at a size, by seed."""
        found = [cell for cell in self.cells if (cell["method"], cell["size"]) == (method, size)]
        return sorted(found, key=lambda cell: cell["seed"])


def read_results(folder: str | os.PathLike[str] | Results) -> Results:
    """Read the folder of a comparison, and check that its parts belong together.

    Args:
        folder (`str` or `PathLike`): with summary.json and cells.jsonl; costs.jsonl and trials.jsonl may be missing.

    Returns:
        [`Results`]. Of cells that were computed more than once the last counts.

    Raises:
        `ValueError`: for a file that is missing or damaged, of another schema, or that does not agree with the others.
    """
    if isinstance(folder, Results):
        return folder
    folder = Path(folder)
    for name in (SUMMARY, CELLS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: expected the folder that `hf-reg compare` wrote.")
    summary = _check(read_json(folder / SUMMARY, largest=100_000_000), SUMMARY, str(folder / SUMMARY))
    wanted = {method["name"] for method in summary["methods"]}, set(summary["sizes"]), set(summary["seeds"])
    keys, cells = summary.get("keys"), {}

    def current(name: str) -> list[dict[str, Any]]:
        """The lines of this recipe; others are of an earlier one."""
        return [line for line in _lines(folder / name) if keys is None or line.get("key") in keys]

    for cell in current(CELLS):
        place = cell["method"], cell["size"], cell["seed"]
        if all(part in known for part, known in zip(place, wanted, strict=True)):
            cells[place] = cell
    results = Results(folder, summary, list(cells.values()), current(COSTS), current(TRIALS))
    _check_names(results)
    _check_order(results)
    _check_rows(results)
    return results


def _check_names(results: Results) -> None:
    where = results.folder / SUMMARY
    if results.reference not in results.methods:
        raise ValueError(f"{where}: the reference {results.reference!r} is none of its methods.")
    if results.summary["metric"]["name"] not in results.measures:
        raise ValueError(f"{where}: the metric {results.summary['metric']['name']!r} is none of its measures.")
    if not results.sizes:
        raise ValueError(f"{where} names no size.")
    for row in results.rows.values():
        verdict = (row.get("difference") or {}).get("verdict", VERDICTS[-1])
        if verdict not in VERDICTS:
            raise ValueError(f"{where}: verdict {shown(verdict)}; expected one of {', '.join(map(repr, VERDICTS))}.")


def _check_order(results: Results) -> None:
    for row in results.rows.values():
        for one in (row, row.get("difference") or {}):
            low, high = one.get("low"), one.get("high")
            if low is not None and high is not None and low > high:
                raise ValueError(f"{results.folder / SUMMARY} has an interval from {low} to {high}. {AGAIN}")
    for line in results.costs:
        if not line["low"] <= line["ratio"] <= line["high"]:
            raise ValueError(
                f"{results.folder / COSTS} has a ratio {line['ratio']} with quartiles from {line['low']} to "
                f"{line['high']}. {AGAIN}"
            )


def _check_rows(results: Results) -> None:
    """Whether each row of the summary is that of the cells: as many of them, with that mean."""
    for (method, size, measure), row in results.rows.items():
        values = _values(results.cells_of(method, size), measure)
        if len(values) != row["n"]:
            problem = f"{row['n']} cells, {CELLS} has {len(values)}"
        elif values and not isclose(mean(values), row["mean"], rel_tol=1e-6, abs_tol=1e-9):
            problem = f"a mean of {row['mean']:.6g}, the cells have {mean(values):.6g}"
        else:
            continue
        raise ValueError(
            f"{results.folder / SUMMARY} does not belong to the {CELLS} beside it: {measure} of {method!r} at size "
            f"{size} has {problem}. {AGAIN}"
        )


def _values(cells: Sequence[Mapping[str, Any]], measure: str) -> list[float]:
    return [cell["measures"][measure] for cell in cells if cell["measures"].get(measure) is not None]
