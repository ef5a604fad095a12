"""Seams, which carry the gates of patches; and the attention seam: the one function that the attention modules of
transformers call, and what stands in its way.

transformers sends nearly every attention module through `AttentionInterface.get_interface`. That method is wrapped
once, at the first `patch_model`; what it returns looks for a child named `hf_reg` on the *calling module* and, without
one, calls straight through. So no forward is copied or replaced, no configuration changes, and other models are left
alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from ..base import Gate
from . import gathered, masks, segments


__all__ = ["SEAM", "AttentionSeam", "Seam", "gates", "install", "seams"]

SEAM = "hf_reg"  # name of the child module that carries the gates, or how it begins (projection.py)


class Seam(nn.Module):
    """The gates at one place of a model, in the order in which they were attached."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        from ..checkpoints.saves import install_saves

        install_saves()  # a pickled or deep-copied model may wake up in a process that never called patch_model
        super().__setstate__(state)

    @property
    def ran(self) -> bool:
        """Whether any gate has acted."""
        return any(getattr(gate, "ran", False) for gate in self.children())

    def enabled(self) -> list[Gate]:
        return [gate for gate in self.children() if isinstance(gate, Gate) and gate.enabled()]

    def send(self, states: torch.Tensor) -> torch.Tensor:
        """`states` after every gate that is on."""
        for gate in self.enabled():
            states = gate.transform(states)
            if not torch.compiler.is_compiling():
                gate.ran = True
        return states


class AttentionSeam(Seam):
    """The gates of one attention module."""

    def __init__(self, kind: str, prefix: bool) -> None:
        super().__init__()
        self.kind = kind
        self.prefix = prefix  # the module takes a cache, so keys before the queries are cached ones

    def __setstate__(self, state: dict[str, Any]) -> None:
        install()
        super().__setstate__(state)

    def attend(
        self,
        function: Callable[..., Any],
        implementation: str | None,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        spared: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The model's own attention `function` with the gates applied: mask first, heads last."""
        enabled = self.enabled()
        if not enabled:
            return function(module, query, key, value, attention_mask, **kwargs)
        wrapped = function
        for gate in enabled:
            wrapped = gate.wrap(wrapped)
        view = gathered.gatherable(enabled, wrapped, module, query, key, attention_mask, spared, kwargs)
        tokens = next((chosen for gate in enabled if view and (chosen := gate.hidden_tokens(view))), None)
        for gate in enabled:
            given = attention_mask
            if gate.hides and tokens is None:
                attention_mask = masks.narrow(
                    gate, implementation, module, query, key, given, self.prefix, spared, kwargs
                )
            if not gate.hides or tokens is not None or attention_mask is not given:
                gate.ran = True
            if gate.replaces_dropout and kwargs.get("dropout"):
                kwargs = {**kwargs, "dropout": 0.0}
        if tokens is not None:
            output, weights = gathered.attend(wrapped, tokens, module, query, key, value, kwargs)
        else:
            output, weights = wrapped(module, query, key, value, attention_mask, **kwargs)
        for gate in enabled:
            scales = gate.scales(output.shape[0], output.shape[2], output.device)
            if scales is not None:
                output = output * scales.to(output.dtype)[:, None, :, None]
        return output, weights


def _attend(
    function: Callable[..., Any],
    implementation: str | None,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    spared = kwargs.pop(masks.SPARED, None)
    seam: Any = module._modules.get(SEAM)
    found = segments.segments_of(attention_mask)
    if found is not None:
        if seam is not None and seam.enabled():
            raise ValueError("Patches act on whole rows; this row holds several examples. Lay them out one a row.")
        return segments.attend(function, found, module, query, key, value, kwargs)
    if seam is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    return seam.attend(function, implementation, module, query, key, value, attention_mask, spared, kwargs)


def install() -> None:
    """Wrap `AttentionInterface.get_interface`, once per process."""
    original = AttentionInterface.get_interface
    if getattr(original, "_hf_reg", False):
        return

    @functools.wraps(original)
    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
        return functools.partial(_attend, original(self, attn_implementation, default), attn_implementation)

    get_interface._hf_reg = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface


def seams(model: nn.Module) -> list[tuple[str, nn.Module, str, Seam]]:
    """Every seam in `model`: path of the module that carries it, that module, its name there, and the seam."""
    return [
        (path, module, name, child)
        for path, module in model.named_modules()
        for name, child in module._modules.items()
        if isinstance(child, Seam)
    ]


def gates(model: nn.Module) -> Iterator[Gate]:
    """Every live gate in `model`."""
    for _, _, _, seam in seams(model):
        yield from seam.children()  # type: ignore[misc]
