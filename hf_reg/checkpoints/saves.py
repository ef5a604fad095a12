"""`save_pretrained` of patched models, which replaces an earlier checkpoint in one step.

That method of transformers and of PEFT writes in place. It is wrapped once, at the first `patch_model`: the files of a
model that carries patches go through `replacing_checkpoint`; any other model saves as before.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..files import is_staged
from ..seams.attention import gates
from .writing import replacing_checkpoint


__all__ = ["install_saves"]


def _stages(model: nn.Module, folder: Path, settings: dict[str, Any]) -> bool:
    """Whether this process writes all files of a patched model, and nobody stages them already."""
    writes = getattr(model, "should_save_on_this_rank", bool)(settings["is_main_process"])
    return writes and not settings.get("distributed_checkpoint") and any(gates(model)) and not is_staged(folder)


def _wrap(owner: Any) -> None:
    original = owner.save_pretrained
    if getattr(original, "_hf_reg", False):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        settings = call.arguments
        folder = Path(settings["save_directory"])
        if not _stages(settings["self"], folder, settings):
            return original(*args, **kwargs)
        if settings.get("push_to_hub"):
            settings["kwargs"].setdefault("repo_id", folder.name)  # transformers would take the name of its folder
        with replacing_checkpoint(folder) as unfinished:
            settings["save_directory"] = str(unfinished)
            return original(*call.args, **call.kwargs)

    save_pretrained._hf_reg = True  # type: ignore[attr-defined]
    owner.save_pretrained = save_pretrained


def install_saves() -> None:
    """Wrap `save_pretrained` of transformers and PEFT, once per process."""
    for owner in (PreTrainedModel, PeftModel):
        _wrap(owner)
