"""Errors for settings that are out of range, of the wrong type, or not known."""

from __future__ import annotations

from collections.abc import Sequence


__all__ = ["check_choice", "check_range"]


def check_choice(owner: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{owner}: {name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def check_range(owner: str, name: str, value: object, low: float, high: float, *, closed: bool = False) -> None:
    """Raise `TypeError` for a value that is no number and `ValueError` for one outside `[low, high)`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r} ({type(value).__name__}).")
    if not (low <= value < high or (closed and value == high)):
        raise ValueError(
            f"{owner}: {name}={value} is out of range; give {low} <= {name} {'<=' if closed else '<'} {high}."
        )
