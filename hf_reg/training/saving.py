"""Saving from a trainer: files get their names when all are written; hf_reg.json beside adapters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.block import block_of
from ..files import staging


__all__ = ["SavingMixin"]

if TYPE_CHECKING:
    from transformers import Trainer as _Base  # what it is mixed into
else:
    _Base = object

WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
FACTORS = ("hf_reg.json", "hf_reg.safetensors")  # of an adapter


def _write_training(model: Any, folder: Path) -> None:
    """hf_reg.json for plain adapters in training with patches or penalties; SVD adapters write their own."""
    from peft import PeftModel

    from ..adapters.config import SvdAdapterConfig
    from ..adapters.storage import write_settings

    if not isinstance(model, PeftModel) or block_of(model.get_base_model()) is None:
        return
    for name, config in model.peft_config.items():
        place = folder if name == "default" else folder / name
        if place.is_dir() and not isinstance(config, SvdAdapterConfig):
            write_settings(model, place)


def _left_over(folder: Path, written: set[str]) -> list[Path]:
    """Weights of an earlier checkpoint in `folder` that a loader would take for those just written."""
    if "adapter_config.json" in written:
        return [folder / name for name in FACTORS if name not in written]
    if not any(WEIGHTS.fullmatch(name) for name in written):
        return []
    return [path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name) and path.name not in written]


class SavingMixin(_Base):
    """What a trainer writes takes the place of an earlier checkpoint when it is complete, file by file."""

    bare_model: Any

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if not self.args.should_save:  # takes part in gathering
            super()._save(str(folder), state_dict)
            return
        with staging(folder) as unfinished:
            if (folder / "README.md").is_file():  # PEFT adds to a card that is there
                (unfinished / "README.md").write_bytes((folder / "README.md").read_bytes())
            super()._save(str(unfinished), state_dict)
            _write_training(self.bare_model, unfinished)
            written = {path.name for path in unfinished.iterdir()}
        for path in _left_over(folder, written):
            path.unlink(missing_ok=True)
