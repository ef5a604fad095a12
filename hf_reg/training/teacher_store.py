"""A folder of teacher logits by example: files that are only ever added, whole ones, by any number of processes."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..files import replacing
from ..penalties import TopLogits


__all__ = ["TeacherStore"]

PARTS = ("values", "indices", "logsumexp")
POSITIONS = 1 << 16  # in memory before a file is written


class TeacherStore:
    """Rows of [`TopLogits`] by example number.

    A file holds some examples: `ids`, `hashes` and `ends` (E,), and the rows of all of them behind one another. It is
    written under another name and renamed, so that a reader never meets half a file, and its name is unique, so that
    processes need not know of each other. Reading maps it into memory and takes the rows that are asked for.

    Args:
        folder (`Path`): is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, Any] = {}
        self._places: dict[int, tuple[str, int, int, int]] = {}  # file, first row, last row, hash
        self._new: dict[int, tuple[int, TopLogits]] = {}
        self._positions = 0

    def __len__(self) -> int:
        return len(self._places) + len(self._new)

    def refresh(self) -> None:
        """Take notice of files that came since."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._files:
                continue
            file = self._files[path.name] = safe_open(path, framework="pt")
            ids, hashes, ends = (file.get_tensor(name).tolist() for name in ("ids", "hashes", "ends"))
            for number, mark, start, end in zip(ids, hashes, [0, *ends], ends, strict=False):
                self._places[number] = (path.name, start, end, mark)

    def find(self, number: int, mark: int) -> TopLogits | None:
        """The rows of an example, or None.

        Args:
            number (`int`): of the example.
            mark (`int`): hash of its tokens.

        Raises:
            `ValueError`: if the example that is kept under this number has other tokens.
        """
        if number in self._new:
            known, rows = self._new[number]
        elif number in self._places:
            name, start, end, known = self._places[number]
            rows = TopLogits(*(self._files[name].get_slice(part)[start:end] for part in PARTS))
        else:
            return None
        if known != mark:
            raise ValueError(
                f"Example {number} has other tokens or other answer positions than the one that the teacher's logits "
                f"in {self.folder} belong to. Delete that folder, or give teacher_cache another one for these data."
            )
        return rows

    def add(self, number: int, mark: int, rows: TopLogits) -> None:
        """Keep the rows of an example; they are on disk after `flush`, or when enough came together."""
        kept = TopLogits(*(getattr(rows, part).detach().cpu().clone() for part in PARTS))
        self._new[number] = (mark, kept)
        self._positions += len(kept.values)
        if self._positions >= POSITIONS:
            self.flush()

    def flush(self) -> None:
        """Write what is new."""
        if not self._new:
            return
        numbers, marks = list(self._new), [mark for mark, _ in self._new.values()]
        rows = [one for _, one in self._new.values()]
        ends = torch.tensor([len(one.values) for one in rows]).cumsum(0)
        tensors = {"ids": torch.tensor(numbers), "hashes": torch.tensor(marks), "ends": ends}
        tensors |= {part: torch.cat([getattr(one, part) for one in rows]) for part in PARTS}
        with replacing(self.folder / f"{uuid.uuid4().hex}.safetensors") as unfinished:
            save_file(tensors, unfinished)
        self._new, self._positions = {}, 0
        self.refresh()


def split_rows(rows: TopLogits, counts: Sequence[int]) -> list[TopLogits]:
    """The rows of each example, from those of a batch."""
    parts = [getattr(rows, part).split(list(counts)) for part in PARTS]
    return [TopLogits(*one) for one in zip(*parts, strict=True)]


def join_rows(parts: Sequence[TopLogits], device: torch.device) -> TopLogits:
    """The rows of a batch, from those of its examples."""
    return TopLogits(*(torch.cat([getattr(one, part) for one in parts]).to(device) for part in PARTS))
