"""Interleaved timing (every round runs every variant once, and only ratios within a round are compared), and peak
memory as torch's own allocator records it: a count of bytes, the same in every run."""

from __future__ import annotations

import ctypes
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.progress import track
from torch.profiler import ProfilerActivity, profile


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
    spread: tuple[float, float] | None = None  # None: measured without noise

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


def keep_freed_memory() -> None:
    """Have malloc keep for this process what it frees. By default glibc gives large blocks back and takes them again,
    now and then, and on a virtual machine the page faults are 1 to 6 % of a step, of which variant is chance.

    Raises:
        `OSError`: where the C library is not glibc.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        raise OSError("The benchmarks need glibc, whose malloc can be told to keep the memory that is freed.")
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    if not (library.mallopt(trim_threshold, 2**31 - 1) and library.mallopt(mmap_max, 0)):
        raise OSError("mallopt refused M_TRIM_THRESHOLD or M_MMAP_MAX.")


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


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that `run` needs at once, above what was there before; called once before to make what it keeps."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        recorded.export_chrome_trace(file.name)
        events = json.load(open(file.name))["traceEvents"]
    levels = [event["args"] for event in events if event.get("name") == "[memory]"]
    first = levels[0]["Total Allocated"] - levels[0]["Bytes"]
    return max(level["Total Allocated"] for level in levels) - first


def memory_rows(
    section: str, case: str, variants: dict[str, Callable[[], object]], ours: tuple[str, ...]
) -> list[Row]:
    """A row for each of `ours` against every other variant: peak memory of one step above the model."""
    peaks = {name: peak_memory(run) for name, run in variants.items()}
    peers = [name for name in variants if name not in ours]
    return [
        Row(section, f"{case}, peak memory", name, peer, peaks[name] / peaks[peer], None)
        for name in ours
        for peer in peers
    ]
