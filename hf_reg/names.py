"""Which known name a wrong one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


__all__ = ["nearest"]


def nearest(name: str, known: Sequence[str]) -> str:
    """`" Did you mean 'tlm'?"`, or nothing where no known name is near."""
    match = difflib.get_close_matches(str(name), known, 1)
    return f" Did you mean {match[0]!r}?" if match else ""
