"""Dropout of single units, faster on a CPU than torch's: the masks are compared from raw random bits.

`torch.nn.functional.dropout` draws a Bernoulli variable for each unit, which on a CPU is most of what it costs. Here
64 random bits make four masks, and a byte for each unit is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


__all__ = ["LEVELS", "drop_units", "random_bits", "stay", "stay_and_scale"]

PIECE = 65536  # units at a time: what a step of arithmetic leaves behind stays in the cache of a core; as measured
LEVELS = 65536  # 16 bits a unit: a rate is met to 8e-6, and the mean exactly, since what is met is what is scaled by


class _Masked(torch.autograd.Function):
    """`states * keep * scale`, keeping one byte a unit."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return keep.to(states.dtype).mul_(scale).mul_(states)  # in one new tensor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (keep,) = ctx.saved_tensors
        return keep.to(grads[0].dtype).mul_(ctx.scale).mul_(grads[0]), None, None


def random_bits(shape: torch.Size) -> torch.Tensor:
    """Uniform int16 of this shape on the CPU, four from each draw."""
    bits = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return bits.view(torch.int16)[: shape.numel()].view(shape)


def stay(keep: torch.Tensor) -> torch.Tensor:
    """1 with probability `keep`, a tensor of any shape, and else 0; in its dtype."""
    if keep.device.type != "cpu" or torch.compiler.is_compiling():
        return (torch.rand(keep.shape, device=keep.device) < keep).to(keep.dtype)
    levels = keep.float().mul(LEVELS).sub_(LEVELS // 2)  # a new tensor, also where `keep` is fp32 itself
    return torch.lt(random_bits(keep.shape).float(), levels, out=levels).to(keep.dtype)


def stay_and_scale(like: torch.Tensor, keep_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """1 / keep with probability keep, and else 0: what to multiply units by, so that their mean stays.

    Args:
        like (`torch.Tensor`): of any shape; what follows has it too, without a gradient.
        keep_of (`Callable`): the probability to keep each unit, in (0, 1], a new tensor, of `like` or a piece of it.
    """
    like = like.detach()
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        keep = keep_of(like)
        return stay(keep).div_(keep)
    scale = torch.empty(like.shape, dtype=like.dtype)
    pieces = (one.reshape(-1).split(PIECE) for one in (like, random_bits(like.shape), scale))
    for piece, bits, out in zip(*pieces, strict=True):
        keep = keep_of(piece).float()
        levels = keep.mul(LEVELS).sub_(LEVELS // 2)
        torch.div(torch.lt(bits.float(), levels, out=levels), keep, out=out)
    return scale


def drop_units(states: torch.Tensor, rate: float) -> torch.Tensor:
    """Dropout: each unit is 0 with probability `rate`, and otherwise divided by the probability to stay.

    Args:
        states (`torch.Tensor`): of any shape.
        rate (`float`): in [0, 1].

    Returns:
        `torch.Tensor`: of the same shape. Draws from torch's default generator of the device.
    """
    level = round(rate * LEVELS)
    if states.device.type != "cpu" or level == LEVELS:
        return torch.nn.functional.dropout(states, rate)
    keep = torch.empty(states.shape, dtype=torch.uint8)
    torch.ge(random_bits(states.shape), level - LEVELS // 2, out=keep)
    return _Masked.apply(states, keep, LEVELS / (LEVELS - level))
