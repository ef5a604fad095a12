"""Writing a checkpoint over an earlier one: all files change at once, and none of the earlier one is read again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..files import staging


__all__ = ["replacing_checkpoint"]

WEIGHTS = re.compile(
    r"(?:adapter_)?model(?:\.(?P<variant>\w+))??(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(?P<index>\w+))?\.json)?"
)
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


def _variants(names: Iterable[str]) -> dict[str, str]:
    """The files of weights among `names`, with the variant (`fp16`) that each is of; an empty one for most."""
    found = {name: WEIGHTS.fullmatch(name) for name in names}
    return {name: match["variant"] or match["index"] or "" for name, match in found.items() if match}


def _outdated(folder: Path, written: set[str]) -> set[str]:
    """Files of an earlier checkpoint in `folder` that a loader would take for those of the one just written."""
    adapters = [Path(name).parent for name in written if Path(name).name == ADAPTER]
    found = {(place / name).as_posix() for place in adapters for name in FACTORS}
    variants = set(_variants(written).values())
    if ADAPTER not in written and variants:  # a whole model
        there = _variants(path.name for path in folder.iterdir())
        found |= {name for name, variant in there.items() if variant in variants} | {ADAPTER, *FACTORS}
    return found
