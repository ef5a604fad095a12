"""Hiding whole tokens without a mask: each group of rows attends to the keys that it keeps, gathered side by side.

The CPU kernel of sdpa is 6 to 7 % slower with any (B, 1, T, T) mask than with none, one of zeros included. Where the
model itself hides nothing (bidirectional, no padding), the rows that are not selected all keep the same keys, a
siblings-masked row keeps its own value, and only the few self-masked rows need a mask. So the tokens of each example
are brought into the order [ordinary | self-masked | siblings-masked], in which every group and the keys that it keeps
are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..base import Gate
from .masks import TokenView, is_causal, spared_tokens


__all__ = ["attend", "gatherable"]

SHORTEST = (
    512  # tokens from which gathering is faster than a mask (measured, a step of MiniLM: 1.08 at 256, 0.94 at 512)
)


class _Permute(torch.autograd.Function):
    """Rows of a table in another order; unlike that of `index_select`, the gradient is a permutation too."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return table.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def gatherable(
    gates: list[Gate],
    function: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    spared: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> TokenView | None:
    """The tokens of this call if they can be gathered: sdpa on a CPU, not compiled, nothing hidden by the model."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if (
        function is not sdpa_attention_forward
        or query.device.type != "cpu"
        or torch.compiler.is_compiling()
        or mask is not None
        or queries != keys
        or keys < SHORTEST
        or is_causal(module, kwargs)
        or sum(gate.hides for gate in gates) != 1
        or (kwargs.get("dropout") and not any(gate.replaces_dropout for gate in gates))
        or kwargs.get("position_bias") is not None
    ):
        return None
    return TokenView(None, batch, keys, keys, query.device, spared=spared_tokens(spared, batch, keys))


def attend(
    function: Callable[..., Any],
    tokens: tuple[torch.Tensor, torch.Tensor, str],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """`function` over the gathered tokens: equal to it with the mask of `hide_tokens`, whatever the groups are.

    Args:
        tokens (`tuple`): `selected` and `self_masked`, (B, T) bool each, and `hide`.

    Returns:
        `tuple`: the output (B, T, H, D), and None for the probabilities.
    """
    selected, self_masked, hide = tokens
    batch, heads, length, _ = query.shape
    group = selected.byte() * (2 - self_masked.byte())  # 0 ordinary, 1 self-masked, 2 siblings-masked
    order = group.argsort(dim=1, stable=True)
    order += torch.arange(0, batch * length, length)[:, None]
    order = order.flatten()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(batch * length)
    counts = torch.nn.functional.one_hot(group.long(), 3).sum(1).tolist()

    def examples(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        table = states.transpose(1, 2).reshape(batch * length, states.shape[1], -1)
        return _Permute.apply(table, order, inverse).view(batch, length, states.shape[1], -1).transpose(1, 2).split(1)

    rows = []
    for q, k, v, (ordinary, own, siblings) in zip(
        examples(query), examples(key), examples(value), counts, strict=True
    ):
        if ordinary:
            kept = ordinary + {"selected": 0, "siblings": own, "none": own + siblings}[hide]
            rows.append(function(module, q[:, :, :ordinary], k[:, :, :kept], v[:, :, :kept], None, **kwargs)[0])
        if own:
            mask = torch.ones(1, 1, own, length, dtype=torch.bool)
            mask[..., ordinary : ordinary + own].diagonal(dim1=-2, dim2=-1).fill_(False)
            rows.append(function(module, q[:, :, ordinary : ordinary + own], k, v, mask, **kwargs)[0])
        if siblings == length:  # queries and keys keep their gradients, of zeros
            mask = torch.eye(length, dtype=torch.bool)[None, None]
            rows.append(function(module, q, k, v, mask, **kwargs)[0])
        elif siblings:
            own_values = v[:, :, ordinary + own :].transpose(1, 2)
            rows.append(own_values.repeat_interleave(heads // v.shape[1], dim=2))
    output = _Permute.apply(torch.cat(rows, dim=1)[0], inverse, order)
    return output.view(batch, length, heads, -1), None
