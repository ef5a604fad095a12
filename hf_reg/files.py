"""Files that are there whole or not at all, however many processes write them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another path beside `path` to write to; it takes the place of `path` when the body is through, if it is."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
