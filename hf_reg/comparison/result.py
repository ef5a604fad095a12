"""The result of a comparison, as tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..tables import Shown


__all__ = ["Comparison"]


@dataclass
class Comparison(Shown):
    """What [`compare`] found; `print` it, or leave it to the notebook.

    Attributes:
        folder (`Path`): `cells.jsonl`, `summary.json`, `report.html` and the rest.
        summary (`dict`): what is in `summary.json`.
        failures (`list` of `dict`): runs that failed, each with `name` and `error`.
    """

    folder: Path
    summary: dict[str, Any]
    failures: list[dict[str, Any]] = field(default_factory=list)

    def row(self, method: str, size: int, measure: str) -> dict[str, Any]:
        """The row of a method, size and measure.

        Raises:
            `KeyError`: if there is none, as of a cell that failed.
        """
        for one in self.summary["rows"]:
            if (one["method"], one["size"], one["measure"]) == (method, size, measure):
                return one
        raise KeyError(f"{method}, {size}, {measure}: there is no such row.")

    def as_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "summary": self.summary, "failures": self.failures}

    def _table(self) -> RenderableType:
        parts: list[RenderableType] = [self._of_size(size) for size in self.summary["sizes"]]
        parts.append(Text(f"{NONE}: no difference shown.", style="dim"))
        parts += [Text(note, style="dim") for note in self.summary["notes"]]
        if self.summary["missing"]:
            parts.append(Text(f"{self.summary['missing']} cells are missing.", style="red"))
        parts += [Text(f"{one['name']} failed: {one['error']}", style="red") for one in self.failures]
        return Group(*parts)

    def _of_size(self, size: int) -> Table:
        measures, costs = self.summary["measures"], {one["method"]: one["ratio"] for one in self.summary["costs"]}
        seeds = max((row["n"] for row in self.summary["rows"] if row["size"] == size), default=0)
        title = f"{size} labelled examples, {seeds} seeds: mean, and difference to {self.summary['reference']}"
        heads = [one["name"] + (" (higher)" if one["higher_is_better"] else " (lower)") for one in measures]
        table = Table("method", *heads, *(["step"] if costs else []), title=title, title_justify="left",
                      box=box.SIMPLE_HEAD, pad_edge=False)  # fmt: skip
        rows = {(row["method"], row["measure"]): row for row in self.summary["rows"] if row["size"] == size}
        for method in self.summary["methods"]:
            name = method["name"]
            cost = [f"{costs[name]:.2f}" if name in costs else "-"] if costs else []
            table.add_row(method["label"], *(_told(rows.get((name, one["name"]))) for one in measures), *cost)
        return table


COLOURS = {"better": "green", "worse": "red"}
NONE = "n.d."


def _told(row: dict[str, Any] | None) -> Text:
    """A mean, and under it what differs."""
    if row is None:
        return Text("-")
    text = Text(f"{row['mean']:.4g}")
    if (difference := row["difference"]) is not None:
        verdict = difference["verdict"]
        text.append(f"\n{difference['mean']:+.2g} ", style="dim")
        text.append(verdict if verdict in COLOURS else NONE, style=COLOURS.get(verdict, "dim"))
    return text
