"""From a model, a trainer or a folder to the files that are sent, beside the user's own, which stay as they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .files import WEIGHTS


__all__ = ["name_base", "save", "stage"]

ADAPTER = "adapter_config.json"


def save(source: Any, folder: Path, tokenizer: Any) -> tuple[Path, Any]:
    """The folder that holds `source`, which is written to `folder` unless it is one; and its model, if that is whole.

    Every process must call it: sharded parameters are gathered.

    Raises:
        `TypeError`: for something else. `ValueError`: for a folder that is none, or a model that is sharded.
    """
    if isinstance(source, (str, os.PathLike)):
        if tokenizer is not None:
            raise ValueError(f"tokenizer= goes with a model. Save it into the folder: save_pretrained({source!r}).")
        if not Path(source).is_dir():
            raise ValueError(f"{source} is no folder: expected one that save_pretrained or save_model wrote.")
        return Path(source).resolve(), None
    from torch import nn
    from transformers import Trainer

    if isinstance(source, Trainer):
        model = source.accelerator.unwrap_model(source.model, keep_torch_compile=False)
        folder.mkdir(parents=True)  # a trainer that keeps its shards apart writes nothing
        with _same_bases(model):
            source.save_model(str(folder), _internal_call=True)  # or it would push by itself
    elif isinstance(source, nn.Module):
        model = _bare(source)
        if _is_sharded(model):
            raise ValueError("The model is sharded, so its parameters are not whole here. Push its trainer instead.")
        with _same_bases(model):
            model.save_pretrained(str(folder))
    else:
        raise TypeError(f"push_to_hub of {type(source).__name__}: expected a model, a trainer or a folder.")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form, with the path of the base in it; the card is ours
    return folder, None if _is_sharded(model) else model


def _bare(model: Any) -> Any:
    """Without DDP and `torch.compile` around it.

    Raises:
        `TypeError`: if there is no `save_pretrained` inside.
    """
    while not hasattr(model, "save_pretrained") and hasattr(model, "module"):
        model = model.module
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"push_to_hub of {type(model).__name__}: expected a transformers model or a PeftModel.")
    return model


def _is_sharded(model: Any) -> bool:
    marks = ("full_tensor", "ds_id", "_is_flat_param")
    return any(hasattr(parameter, mark) for parameter in model.parameters() for mark in marks)


@contextmanager
def _same_bases(model: Any) -> Iterator[None]:
    """PEFT notes the path of the base in the user's configuration when it saves: take it out again."""
    before = [(config, config.base_model_name_or_path) for config in getattr(model, "peft_config", {}).values()]
    try:
        yield
    finally:
        for config, name in before:
            config.base_model_name_or_path = name


def stage(folder: Path, files: Iterable[str], staged: Path) -> None:
    """Lay out `files` of `folder` anew: what may be rewritten is copied, weights too where they cannot be linked."""
    for path in files:
        target = staged / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(WEIGHTS):
            try:
                target.hardlink_to(folder / path)
                continue
            except OSError:  # another file system, or another owner
                target.unlink(missing_ok=True)
        shutil.copyfile(folder / path, target)


def _is_local(name: str | None) -> bool:
    """Whether `name` means nothing on another machine."""
    if not name or Path(name).exists():
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def name_base(staged: Path, files: Iterable[str], base_model: str | None, *, where_none: bool = False) -> None:
    """Name `base_model` as the base of every adapter, or of those only that name none.

    Raises:
        `ValueError`: without `base_model`, for an adapter whose base is a path of this machine.
    """
    for path in files:
        if Path(path).name != ADAPTER:
            continue
        config = json.loads((staged / path).read_text(encoding="utf-8"))
        found = config.get("base_model_name_or_path")
        if base_model is None and _is_local(found):
            raise ValueError(
                f"The base of the adapter is {found!r} in {path}: expected a model of the Hub, or nobody else can "
                'load the adapter. Pass base_model="namespace/name".'
            )
        if base_model is not None and not (found and where_none):
            config["base_model_name_or_path"] = base_model
            text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
            (staged / path).write_text(text + "\n", encoding="utf-8")
