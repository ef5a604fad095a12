"""`load_regularized`: a checkpoint with the regularization that it names, from safetensors and plain values only."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from torch import nn
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from ..adapters import get_regularized_peft_model
from ..adapters.storage import holds_svd_adapter
from ..patching import patch_model
from .block import BLOCK
from .folder import ADAPTER, HUB, check_folder, fetch, read_folder_block
from .reading import read_block
from .stock import load_stock


__all__ = ["auto_class_for", "base_of", "load_regularized"]

REFUSED = {
    "trust_remote_code": "code of a checkpoint is never run",
    "code_revision": "code of a checkpoint is never run",
    "use_safetensors": "only safetensors are read",
    "weights_only": "only safetensors are read",
    "gguf_file": "only safetensors are read",
    "from_tf": "only safetensors are read",
    "from_flax": "only safetensors are read",
    "subfolder": "give the folder itself",
    "variant": "rename the files to model.safetensors",
    "config": "the configuration is that of the checkpoint",
    "state_dict": "the weights are those of the checkpoint",
    "adapter_kwargs": "an adapter is loaded from its own folder",
}
TASKS = {  # of peft, and the Auto class of each
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def auto_class_for(folder: Path) -> type:
    """The Auto class of transformers that makes what `architectures` of the configuration names.

    Raises:
        `ValueError`: for an architecture that transformers does not have for this model type.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    named = config.architectures
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ValueError(f"{folder}: architectures is {named!r}; expected one name. Pass auto_class=.")
    autos = [cls for name, cls in vars(modeling_auto).items() if name.startswith("AutoModel")]
    for cls in sorted(autos, key=lambda auto: auto.__name__ == "AutoModelForPreTraining"):
        if type(config) not in cls._model_mapping:
            continue
        made = cls._model_mapping[type(config)]
        if any(one.__name__ == named[0] for one in (made if isinstance(made, (list, tuple)) else (made,))):
            return cls
    raise ValueError(
        f"{folder}: no Auto class of transformers has {named[0][:80]!r} for model_type {config.model_type!r}. Pass "
        "auto_class=."
    )


def _class(auto_class: Any) -> Any:
    if isinstance(auto_class, str) and auto_class.startswith("AutoModel") and hasattr(transformers, auto_class):
        return getattr(transformers, auto_class)
    if isinstance(auto_class, type) and hasattr(auto_class, "from_pretrained"):
        return auto_class
    raise ValueError(f"auto_class is {auto_class!r}; expected a class such as AutoModelForCausalLM, or its name.")


def base_of(adapter: dict[str, Any], base: str | os.PathLike[str] | None) -> Path:
    """The folder of the model that an adapter belongs to.

    Raises:
        `ValueError`: for an adapter that names none, or a base that is an adapter. `OSError`: if it is out of reach.
    """
    named = adapter.get("base_model_name_or_path") if base is None else base
    if not named or not isinstance(named, (str, os.PathLike)):
        raise ValueError(f"The adapter names {named!r} as its base. Pass base=, a folder or a repository of the Hub.")
    revision = adapter.get("revision") if base is None and not Path(named).is_dir() else None
    try:
        folder = fetch(named, **({"revision": revision} if revision else {}))
        check_folder(folder)
    except ValueError as error:
        raise ValueError(f"The base of the adapter cannot be used: {error} Pass base=.") from error
    if (folder / ADAPTER).is_file():
        raise ValueError(f"The base of the adapter, {folder}, is an adapter itself. Merge that one first.")
    return folder


def class_of(folder: Path, adapter: dict[str, Any] | None, auto_class: Any = None) -> Any:
    """What loads the model in `folder`, under an adapter of this configuration."""
    if auto_class is not None:
        return _class(auto_class)
    task = None if adapter is None else adapter.get("task_type")
    return _class(TASKS[task]) if isinstance(task, str) and task in TASKS else auto_class_for(folder)


def _with_adapter(model: Any, folder: Path) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(f"{folder}: the adapter does not fit its base: {' '.join(str(error).split())}") from error


def load_regularized(
    path_or_repo: str | os.PathLike[str],
    *,
    auto_class: type | str | None = None,
    base: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a checkpoint and attach the patches that its `hf_reg` block names. It comes in eval mode.

    Stock transformers loads the same folder as it is, without patches. Here the folder is checked before anything
    loads: weights are read from safetensors only, no code of a checkpoint runs, and the block may hold only known
    methods with plain values in range.

    Args:
        path_or_repo (`str` or `PathLike`): a folder, or a repository of the Hub.
        auto_class (`type` or `str`, *optional*):
            Such as `AutoModelForCausalLM`; by default what the configuration says (an adapter: its task type).
        base (`str` or `PathLike`, *optional*): for an adapter: its base, if not the one that it names.
        kwargs: further arguments of `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...), and
            `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` for a repository.

    Returns:
        `nn.Module`: the model; a `PeftModel` with a trainable adapter for the folder of a LoRA, SORSA or BA-LoRA one.

    Raises:
        `ValueError`: for arguments that would read other weights or run code, a folder that is no checkpoint or holds
            none in safetensors, files that lead out of it, tensors of other shapes than its configuration says, or a
            block that cannot be used. `OSError`: for a repository out of reach.

    Example:

    ```python
    model = load_regularized("out").train()  # patched as it was when it was saved
    ```
    """
    for name in kwargs:
        if name in REFUSED:
            raise ValueError(f"load_regularized takes no {name}: {REFUSED[name]}.")
    folder = fetch(path_or_repo, **{name: kwargs.pop(name) for name in HUB if name in kwargs})
    found = check_folder(folder)
    adapter = found if (folder / ADAPTER).is_file() else None
    block = read_folder_block(folder)
    recipe = None if block is None else read_block(block)
    place = folder if adapter is None else base_of(adapter, base)
    if base is not None and adapter is None:
        raise ValueError(f"base={base!r} is for adapters, but {folder} holds a whole model.")
    loader = class_of(place, adapter, auto_class)
    model: Any = load_stock(loader, place, **kwargs)
    inner = model
    if adapter is not None:
        if holds_svd_adapter(folder):
            model = get_regularized_peft_model(model, folder)
        else:
            model = _with_adapter(model, folder)
        if block is not None:
            setattr(inner.config, BLOCK, block)
    if recipe is None and (adapter is None or not holds_svd_adapter(folder)):
        warnings.warn(f"{folder} names no regularization: loaded as it is.", UserWarning, stacklevel=2)
    if recipe is not None and recipe.patches:
        patch_model(model, recipe.patches)
    return model.eval()
