"""Files that are there whole or not at all, however many processes write them."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


__all__ = ["replacing", "staging"]


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


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder` to write to; its files move up, each by one rename, when the body is through.

    A process that is killed before that leaves `folder` as it was, but for `_saving-*`. Weights move first.
    """
    unfinished = folder / f"_saving-{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        written = [path for path in unfinished.rglob("*") if path.is_file()]
        for path in sorted(written, key=lambda path: (path.suffix != ".safetensors", path)):
            place = folder / path.relative_to(unfinished)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
