"""Which checkpoint a run goes on from; imports nothing, for commands that have to answer at once."""

from __future__ import annotations

import json
import re
from pathlib import Path


__all__ = ["last_checkpoint"]


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in `folder` that was written to its end, which is `trainer_state.json`."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"\D+-(\d+)", path.name))]
    return next((str(path) for _, path in sorted(found, reverse=True) if _is_whole(path / "trainer_state.json")), None)


def _is_whole(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
