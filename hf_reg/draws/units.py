"""Dropout of single units, faster on a CPU than torch's: masks are compared from raw random bytes.

`torch.nn.functional.dropout` draws a Bernoulli variable for each unit, which on a CPU is most of what it costs. Here
64 random bits make eight masks. A byte b, 0 to 255, is the coarse part of a uniform number u = (b + f) / 256; its fine
part f follows a fixed sequence from a start that each call draws. So every u is uniform, to 24 bits: rates and means
are exact. Units share f's start, which matters only where b alone does not decide, for one unit of 256.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


__all__ = ["Bars", "drop_by", "drop_units", "stay"]

PIECE = 65536  # units at a time: what a step of arithmetic leaves behind stays in the cache of a core; as measured
Keep = Callable[[torch.Tensor], torch.Tensor]


def _fine(count: int) -> torch.Tensor:
    """The fine parts of up to `PIECE` numbers, in [0, 1), in fp32: multiples of the golden ratio from a drawn start.

    In steps of 1 / 65536, each of which comes once in as many numbers, and few neighbours spread evenly.
    """
    start = torch.randint(65536, (), device="cpu")
    steps = torch.arange(min(count, PIECE), device="cpu").mul_(40503).add_(start).bitwise_and_(65535)
    return steps.float().div_(65536)


def _bytes(shape: torch.Size) -> torch.Tensor:
    """Uniform int8 of this shape, eight from each draw: b - 128."""
    bits = torch.empty((shape.numel() + 7) // 8, dtype=torch.int64, device="cpu").random_(-(2**63), None)
    return bits.view(torch.int8)[: shape.numel()].view(shape)


class Bars:
    """Draws masks on the CPU for one rate.

    Args:
        rate (`float`): probability of 0, in [0, 255 / 256].
        count (`int`): units of the largest mask that is going to be drawn.
    """

    def __init__(self, rate: float, count: int) -> None:
        self._bars = _fine(count).add_(256 * rate).floor_().sub_(128).to(torch.int8)

    def draw(self, stays: torch.Tensor) -> None:
        """Fill a contiguous int8 tensor of any shape with 0 or, for units that stay, 1."""
        for piece in stays.view(-1).split(PIECE):
            torch.ge(_bytes(piece.shape), self._bars[: len(piece)], out=piece)


class _Masked(torch.autograd.Function):
    """`states * scale` where a unit stays and 0 elsewhere, piece by piece; a byte a unit is kept."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, rate: float, stays: torch.Tensor | None) -> torch.Tensor:
        result = torch.empty(states.shape, dtype=states.dtype, device="cpu")
        bars = Bars(rate, states.numel()) if stays is None else None
        stays = torch.empty(states.shape, dtype=torch.int8, device="cpu") if stays is None else stays
        for given, kept, out in zip(*(one.reshape(-1).split(PIECE) for one in (states, stays, result)), strict=True):
            if bars:
                bars.draw(kept)
            torch.mul(given, kept.to(given.dtype).mul_(1 / (1 - rate)), out=out)
        ctx.save_for_backward(stays)
        ctx.rate = rate
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Masked.apply(grads[0], ctx.rate, *ctx.saved_tensors), None, None


def drop_units(states: torch.Tensor, rate: float) -> torch.Tensor:
    """Dropout: each unit is 0 with probability `rate`, and otherwise divided by the probability to stay.

    Args:
        states (`torch.Tensor`): of any shape.
        rate (`float`): in [0, 1].

    Returns:
        `torch.Tensor`: of the same shape. Draws from torch's default generator of the device.
    """
    if states.device.type != "cpu" or rate > 255 / 256:
        return torch.nn.functional.dropout(states, rate)
    return _Masked.apply(states, rate, None)


def stay(keep: torch.Tensor) -> torch.Tensor:
    """1 with probability `keep`, a tensor of any shape, and else 0; in its dtype."""
    if keep.device.type != "cpu" or torch.compiler.is_compiling():
        return (torch.rand(keep.shape, device=keep.device) < keep).to(keep.dtype)
    return _scale(keep, torch.Tensor.clone, keep.dtype, divided=False)


def _scale(like: torch.Tensor, keep_of: Keep, dtype: torch.dtype, divided: bool = True) -> torch.Tensor:
    """1 / keep, or 1, where a unit stays, which it does where b + f < 256 keep; else 0. Drawn on the CPU."""
    scale = torch.empty(like.shape, dtype=dtype, device="cpu")
    below = _fine(like.numel()).add_(128).neg_()
    for about, out in zip(*(one.reshape(-1).split(PIECE) for one in (like, scale)), strict=True):
        keep = keep_of(about).float()
        bars = torch.add(below[: len(keep)], keep, alpha=256)
        torch.lt(_bytes(keep.shape).float(), bars, out=bars)
        torch.div(bars, keep if divided else 1, out=out)
    return scale


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
    return states * _scale(like, keep_of, states.dtype)
