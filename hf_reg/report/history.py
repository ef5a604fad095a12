"""Logs of a run as series: what `Trainer` logs over the steps, and the history of a cell of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


__all__ = ["Log", "Series", "find_series", "logs_of", "need_series"]

Log = Mapping[str, float]
Series = tuple[list[int], list[float]]  # steps, values


def logs_of(run: Any) -> list[Log]:
    """The logs of a `Trainer`, of its state, or those that are given.

    Raises:
        `TypeError`: for something without logs.
    """
    state = getattr(run, "state", run)
    found = getattr(state, "log_history", state)
    if isinstance(found, Iterable) and not isinstance(found, (str, bytes, Mapping)):
        logs = list(found)
        if all(isinstance(log, Mapping) for log in logs):
            return [log for log in logs if "train_runtime" not in log]  # the summary at the end is no step
    raise TypeError(
        f"Expected a Trainer, its state or its log_history (a list of dicts), got {type(run).__name__}. "
        "Of a saved run: json.load(open('trainer_state.json'))['log_history']."
    )


def find_series(logs: Sequence[Log], *keys: str) -> Series:
    """Steps and values of the logs that have one of the keys; where a log has several, the first counts."""
    points = []
    for log in logs:
        key = next((key for key in keys if log.get(key) is not None), None)
        if key is not None and "step" in log:
            points.append((log["step"], log[key]))
    return [int(step) for step, _ in points], [float(value) for _, value in points]


def need_series(logs: Sequence[Log], *keys: str) -> Series:
    """The same, and an error where there are none.

    Raises:
        `ValueError`: names the keys that are there.
    """
    found = find_series(logs, *keys)
    if not found[0]:
        there = sorted({key for log in logs for key in log})
        wanted = " or ".join(map(repr, keys))
        raise ValueError(
            f"No {wanted} with a step in the history, whose {len(logs)} logs have "
            f"{', '.join(map(repr, there)) or 'no key'}."
        )
    return found
