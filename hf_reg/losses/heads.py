"""The linear head of a causal language model: found by its structure, its transform of the logits found by trial."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..penalties.answers import shifts_labels
from ..penalties.precision import exactly


__all__ = ["CannotFuse", "HeadInput", "LinearHead", "find_head", "head_input", "output_layer", "recognize"]

LARGE = 100.0  # largest logit of the trial: where a soft cap shows
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class CannotFuse(ValueError):
    """Why the loss of a model is not computed in one pass over chunks of its logits."""


@dataclass(frozen=True)
class LinearHead:
    """Logits as a function of hidden states: `cap * tanh(z / cap)` of `z = scale * (hidden W^T + b)`.

    Args:
        weight (`torch.Tensor` of shape `(V, d)`): W, frozen.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): b.
        scale (`float`, *optional*, defaults to 1.0): Cohere's `logit_scale`, one over Granite's `logits_scaling`.
        cap (`float`, *optional*): Gemma's `final_logit_softcapping`; `None`: no cap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def to(self, dtype: torch.dtype) -> LinearHead:
        """The head as autocast computes it in `dtype`."""
        if dtype == self.weight.dtype:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return LinearHead(self.weight.to(dtype), bias, self.scale, self.cap)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits (m, V) of `hidden` (m, d), in the memory of `out` (m or more, V), which is fp32 at least."""
        out, hidden = out[: len(hidden)], hidden.to(self.weight.dtype)
        if out.dtype == self.weight.dtype:
            torch.mm(hidden, self.weight.mT, out=out)
            if self.bias is not None:
                out.add_(self.bias)
        else:  # rounded as the model rounds them
            out.copy_(functional.linear(hidden, self.weight, self.bias))
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.cap is not None:
            out.div_(self.cap).tanh_().mul_(self.cap)
        return out

    def gradient(self, slope: torch.Tensor, logits: torch.Tensor | None = None) -> torch.Tensor:
        """What `slope` (m, V), the gradient at the logits, is at the hidden states (m, d); `slope` is overwritten.

        Args:
            logits (`torch.Tensor` of shape `(m, V)`, *optional*): needed where there is a cap.
        """
        if self.cap is not None:
            assert logits is not None
            slope.addcmul_(slope * logits, logits, value=-1 / self.cap**2)
        found = torch.mm(slope.to(self.weight.dtype), self.weight)
        return found.mul_(self.scale) if self.scale != 1.0 else found


def output_layer(model: nn.Module) -> nn.Module | None:
    """What makes logits of hidden states in a causal language model, unwrapped from PEFT; `None` if it names nothing.

    Raises:
        [`CannotFuse`]: for another task.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not shifts_labels(base):
        raise CannotFuse(f"{type(base).__name__} is no causal language model")
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def find_head(model: nn.Module, trained: bool = False) -> nn.Linear:
    """The head of a causal language model, unwrapped from PEFT, if its logits can be computed outside of the model.

    Args:
        trained (`bool`, *optional*, defaults to `False`): whether the head may be in training.

    Raises:
        [`CannotFuse`]: for another task, and for a head that is trained, adapted, sharded or no plain linear map.
    """
    head = output_layer(model)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    name = type(base).__name__
    if head is None:
        raise CannotFuse(f"{name} names no head (get_output_embeddings)")
    if type(head) is not nn.Linear:
        adapted = hasattr(head, "base_layer") or hasattr(head, "modules_to_save")
        raise CannotFuse(f"the head of {name} is {'adapted' if adapted else f'no plain linear map: {type(head)}'}")
    if not trained and any(parameter.requires_grad for parameter in head.parameters()):
        raise CannotFuse(f"the head of {name} is trained")
    for part in head.parameters():
        if part.is_meta or part.numel() == 0 or hasattr(part, "full_tensor") or hasattr(part, "ds_id"):
            raise CannotFuse(f"the head of {name} is sharded or not on this device")
    if head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"):
        raise CannotFuse(f"the head of {name} has hooks of its own")
    return head


@dataclass
class HeadInput:
    """What entered a head in a forward: hidden states (B, T, d), and the type in which it computes."""

    hidden: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32
    calls: int = 0

    def take(self) -> torch.Tensor:
        """The hidden states, which are let go here.

        Raises:
            [`CannotFuse`]: unless the head was called once, with one tensor of three dimensions.
        """
        hidden, self.hidden = self.hidden, None
        if self.calls != 1 or hidden is None or hidden.dim() != 3:
            shape = "" if hidden is None else f", with {tuple(hidden.shape)}"
            raise CannotFuse(f"the head was called {self.calls} times in a forward{shape}")
        return hidden


@contextmanager
def head_input(head: nn.Linear, scale_to: float | None = None) -> Iterator[HeadInput]:
    """Within it, a forward keeps what enters `head` and computes the logits of the first position only.

    Args:
        scale_to (`float`, *optional*):
            For a trial: hand on every position, scaled so that the largest logit without bias has this size.
    """
    found = HeadInput()

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, device = args[0], args[0].device.type
        if scale_to is not None:
            hidden = hidden * (scale_to / functional.linear(hidden.to(head.weight.dtype), head.weight).abs().max())
        found.hidden, found.calls = hidden, found.calls + 1
        found.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        return (hidden[:, :1] if scale_to is None else hidden, *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _transforms(config: Any) -> Iterator[tuple[float, float | None]]:
    """Scale and cap of the logits that a configuration may mean, those that it names first."""
    values = {name: getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier", "logits_scaling")}
    scales = [1 / value if name == "logits_scaling" else value for name, value in values.items() if value]
    cap = getattr(config, "final_logit_softcapping", None)
    yield from product([*scales, 1.0], [cap, None] if cap else [None])


def recognize(model: nn.Module, head: nn.Linear, tokens: torch.Tensor, **arguments: Any) -> tuple[LinearHead, Any]:
    """The head with its transform of the logits, found by a forward on a few tokens with logits of up to 100.

    Args:
        tokens (`torch.LongTensor` of shape `(1, T)`): a few tokens.
        arguments: passed on to the model.

    Returns:
        the head, and outputs, hidden states and type of the trial, for further comparisons.

    Raises:
        [`CannotFuse`]: if no known transform gives the logits of the model.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    with head_input(head, scale_to=LARGE) as found:
        outputs = model(input_ids=tokens, labels=tokens, **arguments)
    hidden, logits = found.take()[0], getattr(outputs, "logits", None)
    if logits is None or logits.shape != (1, len(hidden), len(head.weight)):
        shape = None if logits is None else tuple(logits.shape)
        raise CannotFuse(f"{type(model).__name__} returns logits {shape}, not those of every position and token")
    logits = logits[0]
    with exactly(logits):
        for scale, cap in _transforms(config):
            ours = LinearHead(head.weight, head.bias, scale, cap)
            out = torch.empty(
                logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device
            )
            difference = ours.to(found.dtype).logits(hidden, out) - logits
            if difference.abs().max() <= TOLERANCES[found.dtype] * logits.abs().max():
                return ours, (outputs, hidden, found.dtype)
    raise CannotFuse(f"the logits of {type(model).__name__} are not a scaled or capped linear map that is known here")
