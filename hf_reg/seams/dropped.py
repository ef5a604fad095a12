"""Dropout of attention probabilities on a CPU, where sdpa with dropout is slow: 1.14 times the whole step.

A few heads at a time, so that their scores stay in the cache of a core, with the masks of `draws/units.py`. All that
models and transformers do around `scaled_dot_product_attention` stays as it is: only that call is answered here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..draws.units import Bars, drop_units


__all__ = ["QuickDropout", "dropped_attention"]

SCORES = 1 << 18  # at a time: 1 MiB; our choice, as measured


def _pieces(shape: Sequence[int]) -> list[tuple[int, slice]]:
    """Example and heads of each piece of (B, H, Tq, Tk): at most `SCORES` scores, or one head."""
    batch, heads, rows, keys = shape
    width = max(1, SCORES // (rows * keys))
    return [(b, slice(h, h + width)) for b in range(batch) for h in range(0, heads, width)]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        rate: float, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        batch, heads, rows, _ = query.shape
        shape = (batch, heads, rows, key.shape[2])
        probabilities, keep = query.new_empty(shape), torch.empty(shape, dtype=torch.int8, device="cpu")
        output = query.new_empty(*shape[:3], value.shape[3])
        ctx.of_mask = None if mask is None else mask.shape
        mask = mask if mask is None else mask.expand(shape)
        up = 1 / (1 - rate)
        Bars(rate, keep.numel()).draw(keep)  # at once: the masks that `drop_units` gives the eager attention
        for place in _pieces(shape):
            scores, kept = probabilities[place], keep[place]
            torch.baddbmm(scores, query[place], key[place].transpose(1, 2), beta=0, alpha=scale, out=scores)
            if mask is not None:
                scores.masked_fill_(~mask[place], -torch.inf) if mask.dtype == torch.bool else scores.add_(mask[place])
                blind = scores.amax(-1, keepdim=True) == -torch.inf  # as padding is: sdpa gives 0 there
            torch.softmax(scores, -1, out=scores)
            if mask is not None:
                scores.masked_fill_(blind, 0)
            torch.bmm(kept.to(scores.dtype).mul_(scores), value[place] * up, out=output[place])
        ctx.save_for_backward(query, key, value, probabilities, keep)
        ctx.up, ctx.scale = up, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, probabilities, keep = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        of_scores = torch.empty_like(probabilities) if ctx.needs_input_grad[3] else None
        for place in _pieces(probabilities.shape):
            chances, out = probabilities[place], grad[place] * ctx.up
            kept = keep[place].to(chances.dtype)
            change = torch.bmm(out, value[place].transpose(1, 2)).mul_(kept)
            torch.bmm(kept.mul_(chances).transpose(1, 2), out, out=of_value[place])
            change = torch._softmax_backward_data(change, chances, -1, chances.dtype)
            if of_scores is not None:
                of_scores[place] = change
            torch.bmm(change, key[place] * ctx.scale, out=of_query[place])
            torch.bmm(change.transpose(1, 2), query[place] * ctx.scale, out=of_key[place])
        of_mask = None if of_scores is None else of_scores.sum_to_size(ctx.of_mask)
        return of_query, of_key, of_value, of_mask, None, None


def dropped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention` with dropout, faster on a CPU; elsewhere, that function.

    Args:
        query (`torch.Tensor` of shape `(B, H, Tq, D)`), key and value (`(B, H, Tk, D)`): in fp32 or fp64 and without
            autocast for the quick way, which has no second derivative.
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as there.

    Returns:
        `torch.Tensor` of shape `(B, H, Tq, D)`.
    """
    # nothing below may depend on who needs a gradient: layers are run again
    states = query, key, value
    if (
        not 0 < dropout_p <= 255 / 256
        or any(one.dim() != 4 or one.device.type != "cpu" or len(one) != len(query) for one in states)
        or query.dtype not in (torch.float32, torch.float64)
        or torch.is_autocast_enabled("cpu")
        or (attn_mask is not None and attn_mask.dim() > 4)
    ):
        return functional.scaled_dot_product_attention(
            *states, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril_()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(query, key, value, attn_mask, dropout_p, scale)


class QuickDropout(TorchFunctionMode):
    """While it is entered, attention with dropout and dropout itself are those of this package."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return dropped_attention(*args, **kwargs)
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return drop_units(input, p) if training and not inplace else functional.dropout(input, p, training, inplace)
