"""Names and values in errors: which known name a wrong one was meant to be, and values of any length in short."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


__all__ = ["nearest", "shown"]

LONGEST = 80  # characters of a value in an error


def nearest(name: str, known: Sequence[str]) -> str:
    """`" Did you mean 'tlm'?"`, or nothing where no known name is near."""
    match = difflib.get_close_matches(str(name)[:LONGEST], known, 1)
    return f" Did you mean {match[0]!r}?" if match else ""


def shown(value: Any) -> str:
    """`repr` of a value, its end left out where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
