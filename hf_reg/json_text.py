"""JSON that others wrote: of a size and a depth that can be read, and plain numbers only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .names import shown


__all__ = ["LARGEST_FILE", "check_size", "read_json"]

LARGEST_FILE = 10_000_000  # bytes of a configuration; we chose it, those of transformers have a few thousand
DEEPEST = 100  # lists and objects inside of each other; we chose it


def _not_a_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _check_depth(value: Any, left: int = DEEPEST) -> None:
    if not left:
        raise ValueError(f"more than {DEEPEST} lists and objects inside of each other")
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(one, left - 1)


def check_size(path: Path, largest: int = LARGEST_FILE) -> None:
    """Raise `ValueError` for a file above `largest` bytes, before any of it is read."""
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path} has {size:,} bytes; such a file has at most {largest:,}.")


def read_json(path: Path, largest: int = LARGEST_FILE, *, finite: bool = True) -> dict[str, Any]:
    """The object of a JSON file.

    Args:
        path (`Path`): of the file.
        largest (`int`, *optional*): bytes.
        finite (`bool`, *optional*, defaults to `True`): refuse NaN and infinity, which `Trainer` writes into its logs.

    Raises:
        `ValueError`: for a file above `largest` bytes, NaN and infinity, nesting without end, or no object.
    """
    check_size(path, largest)
    constant = _not_a_number if finite else float
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)
        _check_depth(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {shown(str(error))}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected a JSON object.")
    return found
