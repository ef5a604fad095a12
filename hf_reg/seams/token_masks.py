"""Hiding whole tokens in an attention mask: three ways to compute the same thing.

A *selected* token attends to itself only, or (`self_masked`) to everything but itself; the rows that are not selected
lose the columns that `hide` names. A row that would lose its last key keeps the keys it had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from ..base import check_choice
from .masks import BlockView, TokenView


__all__ = ["HIDE", "hide_tokens", "hide_tokens_by_rows", "token_level_mask", "token_mask_mod"]

HIDE = ("selected", "siblings", "none")
ONES = 0x0101010101010101  # eight times True


def _columns(selected: torch.Tensor, self_masked: torch.Tensor, hide: str) -> torch.Tensor:
    """The keys, (B, Tk) bool, that the rows which are not selected lose."""
    if hide == "selected":
        return selected
    return selected & ~self_masked if hide == "siblings" else torch.zeros_like(selected)


def token_level_mask(
    allowed: torch.Tensor, selected: torch.Tensor, self_masked: torch.Tensor, *, hide: str = "selected"
) -> torch.Tensor:
    """Combine an attention mask with token-level masking (arXiv 2310.18738, section 3).

    A selected token attends to itself only (siblings-masking) or to everything but itself (self-masking); a row that
    is not selected loses the columns named by `hide`. The result is never more than `allowed`, and a row that would
    lose its last key keeps the keys it had.

    Args:
        allowed (`torch.BoolTensor` of shape `(B, 1 | H, Tq, Tk)` or `(B, Tq, Tk)`):
            What the model's own mask permits, True = may attend. The queries are the last `Tq` of the `Tk` keys.
        selected (`torch.BoolTensor` of shape `(B, Tk)`):
            The tokens that are masked: real ones, and no cached or prefix keys.
        self_masked (`torch.BoolTensor` of shape `(B, Tk)`):
            Those of them that are self-masked; the others are siblings-masked.
        hide (`str`, *optional*, defaults to `"selected"`):
            Columns that ordinary rows lose: `"selected"` (the authors' code), `"siblings"` (only siblings-masked
            tokens) or `"none"`.

    Returns:
        `torch.BoolTensor` of the shape of `allowed` (broadcast to the batch of `selected`).

    Raises:
        `ValueError`: for an unknown `hide`, or shapes that do not fit.
    """
    check_choice("token_level_mask", "hide", hide, HIDE)
    return hide_tokens(allowed, selected, self_masked, hide)


def hide_tokens(allowed: torch.Tensor, selected: torch.Tensor, self_masked: torch.Tensor, hide: str) -> torch.Tensor:
    """For any device and for `torch.compile`: a few dense operations, no data-dependent shape.

    `allowed` (B, 1 | H, Tq, Tk) or (B, Tq, Tk) bool, the queries being the last Tq keys; `selected`, `self_masked`
    (B, Tk).
    """
    queries, keys = allowed.shape[-2:]
    if (
        selected.shape[-1] != keys
        or selected.shape != self_masked.shape
        or allowed.dim() not in (3, 4)
        or keys < queries
    ):
        raise ValueError(
            f"allowed {tuple(allowed.shape)}, selected {tuple(selected.shape)}, self_masked "
            f"{tuple(self_masked.shape)}: "
            "expected (B, 1 | H, Tq, Tk) or (B, Tq, Tk), (B, Tk) and (B, Tk) with Tq <= Tk."
        )
    grid = allowed if allowed.dim() == 4 else allowed[:, None]
    offset = keys - queries
    own = torch.arange(keys, device=grid.device) == torch.arange(offset, keys, device=grid.device)[:, None]
    selected = selected & pad(
        grid.diagonal(offset, dim1=-2, dim2=-1).any(1), (offset, 0)
    )  # padding does not see itself
    columns = _columns(selected, self_masked, hide)[:, None, None, :]
    row_selected, row_self = (rows[:, None, offset:, None] for rows in (selected, self_masked))
    visible = grid & torch.where(row_selected, own ^ row_self, ~columns)
    visible = torch.where(visible.any(-1, keepdim=True), visible, grid)
    return visible if allowed.dim() == 4 else visible[:, 0]


def hide_tokens_by_rows(
    view: TokenView, real: torch.Tensor | None, selected: torch.Tensor, self_masked: torch.Tensor, hide: str
) -> torch.Tensor:
    """For eager execution on a CPU: one buffer, into which only the selected rows are written; several times faster.

    Rows are handled eight keys at a time where their length allows. `selected` must be real already.
    """
    batch, queries, keys, offset = view.batch, view.queries, view.keys, view.offset
    word = torch.int64 if keys % 8 == 0 else torch.uint8
    full = ONES if word == torch.int64 else 1
    columns = (~_columns(selected, self_masked, hide)).view(word)[:, None]
    row = selected[:, offset:].flatten().nonzero()[:, 0]  # of the (B * Tq, Tk) table
    example, own = row // queries, row % queries + offset
    takes_self = (
        self_masked.flatten()[example * keys + own] if self_masked.is_contiguous() else self_masked[example, own]
    )
    rows = (takes_self.to(word) * full)[:, None]
    if view.allowed is None:
        visible, was = columns.expand(-1, queries, -1).contiguous(), None
        rows = rows.expand(-1, visible.shape[-1])
    else:
        allowed = view.allowed[:, 0]
        base = (allowed if allowed.stride(-1) == 1 else allowed.contiguous()).view(word).expand(batch, -1, -1)
        visible = base & columns
        was = base[example, own - offset]
        rows = was & rows
    table = visible.view(batch * queries, -1)
    table.index_copy_(0, row, rows)
    visible.view(torch.bool).view(-1).index_copy_(0, row * keys + own, ~takes_self)
    if was is not None:
        left = (table[row] != 0).any(-1, keepdim=True)
        table.index_copy_(0, row, torch.where(left, table[row], was))
        assert real is not None
        unreal = (~real).expand(batch, -1).flatten().nonzero()[:, 0]  # padding may have lost every token it saw
        if len(unreal):
            was, now = base[unreal // queries, unreal % queries], table[unreal]
            table.index_copy_(0, unreal, torch.where((now != 0).any(-1, keepdim=True), now, was))
    elif keys == 1:
        visible.fill_(full)
    return visible.view(torch.bool)[:, None]


def token_mask_mod(
    view: BlockView, selected: torch.Tensor, self_masked: torch.Tensor, hide: str
) -> Callable[..., torch.Tensor]:
    """For flex attention: a `mask_mod` to combine with the model's own; nothing of size (B, Tq, Tk) is made."""
    offset = view.offset
    columns = _columns(selected, self_masked, hide)
    self_masked = self_masked & ~pad(view.lonely(), (offset, 0))  # a token that sees only itself keeps itself

    def visible(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        own = q + offset
        return torch.where(selected[b, own], (k == own) ^ self_masked[b, own], ~columns[b, k])

    return visible
