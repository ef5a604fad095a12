"""Tokens that a patch must not select, such as `[CLS]` and `[SEP]`, found by their ids.

An attention module never sees `input_ids`, so each sub-model that does hands a mask down with its keyword arguments.
The mask travels with the call itself, so that gradient checkpointing repeats a layer with the mask it had.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .masks import SPARED
from .own_attention import SeamHook


__all__ = ["SpareTokens", "spare_tokens", "takes_ids"]


class SpareTokens(SeamHook):
    """Forward pre-hook of a sub-model that takes `input_ids`: adds the mask of the spared ones, (B, T) bool."""

    def __init__(self, owner: Any, ids: tuple[int, ...]) -> None:
        self.owner, self.ids = owner, ids

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training:
            return None
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise ValueError(
                "spare_token_ids needs `input_ids`, but the model was called without (with `inputs_embeds`, "
                "say). Pass "
                "`input_ids`, or patch with spare_token_ids=()."
            )
        wanted = torch.tensor(self.ids, device=input_ids.device)
        return args, {**kwargs, SPARED: torch.isin(input_ids, wanted)}


def takes_ids(model: nn.Module, path: str) -> PreTrainedModel:
    """The innermost sub-model around `path` that takes `input_ids` and hands keyword arguments on.

    Raises:
        `ValueError`: if there is none.
    """
    parts = path.split(".")
    for end in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, PreTrainedModel):
            parameters = inspect.signature(type(module).forward).parameters
            if "input_ids" in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                return module
    raise ValueError(
        f"spare_token_ids: no model around {path!r} takes input_ids and hands keywords on; leave it empty."
    )


def spare_tokens(model: nn.Module, path: str, owner: Any, ids: tuple[int, ...]) -> None:
    """Have the sub-model around `path` hand the mask down, once for all of its layers."""
    module = takes_ids(model, path)
    if not any(isinstance(hook, SpareTokens) for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(SpareTokens(owner, ids), with_kwargs=True)
