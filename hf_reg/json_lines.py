"""JSON lines on disk: whole or not there, whenever a process is killed and however many write."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .runs.errors import RunError


__all__ = ["Lines"]

SCHEMA = 1


class Lines:
    """A file of JSON objects, one a line, that only grows.

    Args:
        path (`Path`): the file; it is made by the first line.

    A line is on the disk when `append` returns. The last line may be torn by a kill: readers pass over it, the next
    `append` cuts it off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Every whole line.

        Raises:
            [`RunError`]: for a line that is no JSON object, or of another version.
        """
        if not self.path.is_file():
            return []
        *lines, _ = self.path.read_bytes().split(b"\n")
        return [self._parsed(line, number) for number, line in enumerate(lines, start=1)]

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            found = json.loads(line)
            if found["schema"] == SCHEMA:
                return found
            what = f"has schema {found['schema']!r}; this version of hf_reg reads {SCHEMA}"
        except (ValueError, TypeError, KeyError):
            what = "is no line of a comparison"
        raise RunError(f"{self.path}: line {number} {what}. Remove that line, or give another compare.folder.")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line, and wait until the disk has it."""
        from filelock import FileLock

        line = json.dumps({"schema": SCHEMA, **record}, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        with FileLock(self.path.parent / ".lock"), open(self.path, "ab+") as file:
            torn = self._torn(file)
            if torn:
                file.truncate(file.seek(0, os.SEEK_END) - torn)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _torn(file: Any) -> int:
        """How many bytes follow the last whole line."""
        end = place = file.seek(0, os.SEEK_END)
        while place > 0:
            start = max(place - 4096, 0)
            file.seek(start)
            found = file.read(place - start).rfind(b"\n")
            if found >= 0:
                return end - (start + found + 1)
            place = start
        return end
