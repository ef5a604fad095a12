"""What the methods cost: the lines of costs.md, which are quoted from the results of the benchmarks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple


__all__ = ["Cost", "costs"]


class Cost(NamedTuple):
    """One measured ratio, ours to a peer's: 1.02 is 2 % more."""

    section: str
    case: str
    ours: str
    peer: str
    ratio: float


@cache
def costs() -> tuple[str, tuple[Cost, ...]]:
    """On what the costs were measured, and the lines of costs.md."""
    head, _, body = Path(__file__).with_name("costs.md").read_text(encoding="utf-8").partition("\n\n|")
    rows = []
    for line in body.splitlines()[2:]:
        section, case, ours, peer, ratio = (cell.strip() for cell in line.strip().strip("|").split("|")[:5])
        rows.append(Cost(section, case, ours, peer, float(ratio)))
    return " ".join(head.split()), tuple(rows)
