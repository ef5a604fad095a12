"""Dropout that a model's class does not have: a gate in the module, and a hook that passes through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


__all__ = ["GATES", "AddedDropout", "add", "remove_added"]

GATES = {"hidden": "hf_reg_hidden", "ffn": "hf_reg_ffn"}  # names of the child modules that are added


class AddedDropout(nn.Dropout):
    """Dropout that the model's class does not have, at the output or the input of the module that holds it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if self.training and self.p > 0 else input


class DropOutput:
    """Forward hook: dropout on what a residual branch returns. A plain object: copies and pickles own theirs."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        gate = module._modules[GATES["hidden"]]
        if isinstance(output, torch.Tensor):
            return gate(output)  # type: ignore[misc]
        return (gate(output[0]), *output[1:]) if isinstance(output, tuple) else None  # type: ignore[misc]


class DropInput:
    """Forward pre-hook of a down-projection: dropout on the activation."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (module._modules[GATES["ffn"]](args[0]), *args[1:])  # type: ignore[misc]


def remove_added(model: nn.Module, kind: str) -> None:
    hook = DropOutput if kind == "hidden" else DropInput
    for module in model.modules():
        if module._modules.pop(GATES[kind], None) is not None:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, one in hooks.items() if isinstance(one, hook)]:
                    del hooks[key]


def add(module: nn.Module, kind: str, rate: float) -> None:
    module.add_module(GATES[kind], AddedDropout(rate).train(module.training))
    if kind == "hidden":
        module.register_forward_hook(DropOutput())
    else:
        module.register_forward_pre_hook(DropInput())
