"""Dropout of single units, faster on a CPU than torch's: the masks are compared from raw random bits.

`torch.nn.functional.dropout` draws a Bernoulli variable for each unit, which on a CPU is most of what it costs. Here
64 random bits make four masks, and a byte for each unit is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


__all__ = ["LEVELS", "drop_by", "drop_units", "random_bits", "stay"]

PIECE = 65536  # units at a time: what a step of arithmetic leaves behind stays in the cache of a core; as measured
Keep = Callable[[torch.Tensor], torch.Tensor]
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


class _Drawn(torch.autograd.Function):
    """`states / keep` where a unit stays and 0 elsewhere, piece by piece; a byte a unit is kept, `keep` is not."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, like: torch.Tensor, keep_of: Keep, stays: torch.Tensor | None
    ) -> torch.Tensor:
        result = torch.empty(states.shape, dtype=states.dtype)
        draws = stays is None
        stays = torch.empty(states.shape, dtype=torch.uint8) if stays is None else stays
        pieces = (one.reshape(-1).split(PIECE) for one in (states, like, stays, result))
        for given, about, stay_here, out in zip(*pieces, strict=True):
            keep = keep_of(about).float()
            if draws:
                levels = keep.mul(LEVELS).sub_(LEVELS // 2)
                torch.lt(random_bits(about.shape).float(), levels, out=stay_here)
            torch.mul(given, stay_here.float().div_(keep), out=out)
        ctx.save_for_backward(like, stays)
        ctx.keep_of = keep_of
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        like, stays = ctx.saved_tensors
        return _Drawn.apply(grads[0], like, ctx.keep_of, stays), None, None, None


def drop_by(states: torch.Tensor, like: torch.Tensor, keep_of: Keep) -> torch.Tensor:
    """Dropout with a probability for each unit: divided by it where the unit stays, so that the mean stays.

    Args:
        states (`torch.Tensor`): of any shape.
        like (`torch.Tensor` of the same shape): what the probabilities follow from; without a gradient.
        keep_of (`Callable`): the probability to keep each unit, in (0, 1], a new tensor, of `like` or a piece of it.

    Returns:
        `torch.Tensor`: of the shape and dtype of `states`.
    """
    like = like.detach()
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        keep = keep_of(like)
        return states * stay(keep).div_(keep)
    return _Drawn.apply(states, like, keep_of, None)


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
