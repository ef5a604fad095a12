"""Interleaved timing: every round runs every variant once, and only ratios within a round are compared."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.progress import track


@dataclass(frozen=True)
class Row:
    """One line of the result table: what was compared, the measured ratio, and the target it has to meet."""

    section: str
    case: str
    ours: str
    peer: str
    ratio: float
    target: float | None
    at_least: bool = False
    spread: tuple[float, float] = (0.0, 0.0)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


def interleave(
    variants: dict[str, Callable[[], object]], rounds: int, label: str, warmup: int = 2
) -> dict[str, list[float]]:
    """CPU seconds of each variant, a value per round, the order shuffled within each round (one thread: see
    __main__)."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(0)
    for number in track(range(rounds + warmup), description=f"{label:<40}", transient=True):
        shuffle.shuffle(order)
        for name in order:
            start = time.process_time()
            variants[name]()
            if number >= warmup:
                times[name].append(time.process_time() - start)
    return times


def ratio(times: dict[str, list[float]], ours: str, peer: str) -> tuple[float, tuple[float, float]]:
    """Median of the ratios of the rounds, and their quartiles."""
    ratios = [a / b for a, b in zip(times[ours], times[peer], strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), (quarters[0], quarters[2])
