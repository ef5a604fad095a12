"""Writing a checkpoint over an earlier one: all files change at once, and none of the earlier one is read again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..files import staging


__all__ = ["replacing_checkpoint"]

WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
ADAPTER, CARD = "adapter_config.json", "README.md"
FACTORS = ("hf_reg.json", "hf_reg.safetensors")  # of an adapter


@contextmanager
def replacing_checkpoint(folder: Path) -> Iterator[Path]:
    """A folder to save into; when the body is through, its files take the place of a checkpoint in `folder` at once.

    Other files of `folder` stay. A model card is there already, since PEFT adds to it.
    """
    with staging(folder, partial(_outdated, folder)) as unfinished:
        if (folder / CARD).is_file():
            (unfinished / CARD).write_bytes((folder / CARD).read_bytes())
        yield unfinished


def _outdated(folder: Path, written: set[str]) -> set[str]:
    """Files of an earlier checkpoint in `folder` that a loader would take for those of the one just written."""
    adapters = [Path(name).parent for name in written if Path(name).name == ADAPTER]
    found = {(place / name).as_posix() for place in adapters for name in FACTORS}
    if ADAPTER not in written and any(WEIGHTS.fullmatch(name) for name in written):  # a whole model
        found |= {path.name for path in folder.iterdir() if WEIGHTS.fullmatch(path.name)} | {ADAPTER, *FACTORS}
    return found
