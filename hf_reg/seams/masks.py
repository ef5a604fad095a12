"""Attention masks as they arrive, and how a gate narrows them. The given mask is combined, never rebuilt.

What the mask means depends on the backend that transformers asked for:

| backend | None | bool | float | BlockMask |
|---|---|---|---|---|
| sdpa | causal if `is_causal` (keyword or attribute) | True = may attend | added to the scores | - |
| eager | everything | True = may attend (a sub-model with a backend of its own) | added to the scores | - |
| flex_attention | everything | - | added to the scores | block-sparse |

Additive masks keep their values (ALiBi, relative positions, Swin windows); what a gate hides is set to the minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from ..base import Gate


__all__ = [
    "BLOCKED", "SPARED", "BlockView", "TokenView", "is_causal", "narrow", "narrow_scores", "refuse_backend",
    "spared_tokens",
]  # fmt: skip

SPARED = "hf_reg_spared"  # keyword that carries the (B, T) mask of spared tokens from the sub-model down to the seam
BLOCKED = -1e4  # an additive mask at or below this leaves a probability of exactly 0 in every floating-point format
DENSE = ("eager", "sdpa", "flex_attention", None)


def refuse_backend(method: str, implementation: str | None) -> None:
    """Raise `ValueError` for a backend without a mask that could be narrowed."""
    if implementation not in DENSE:
        raise ValueError(
            f"{method} changes the attention mask, and attention implementation {implementation!r} takes none. Use "
            "'sdpa', 'eager' or 'flex_attention' (`model.set_attn_implementation('sdpa')`), or a method that "
            "acts on the "
            "heads, such as 'drophead', which works with every implementation."
        )


@dataclass
class TokenView:
    """A dense mask: what each query may attend to.

    Args:
        allowed (`torch.BoolTensor` of shape `(B | 1, H | 1, Tq, Tk)`, *optional*): True = may attend; None = all.
        batch, queries, keys (`int`): the shape of the attention; the queries are the *last* `queries` keys.
        device (`torch.device`): where the mask is needed.
        trusted (`bool`): False where the alignment of queries and keys has to be confirmed by the mask itself.
        spared (`torch.BoolTensor` of shape `(B, Tq)`, *optional*): queries that must not be selected.
    """

    allowed: torch.Tensor | None
    batch: int
    queries: int
    keys: int
    device: torch.device
    trusted: bool = True
    spared: torch.Tensor | None = None

    @property
    def offset(self) -> int:
        """Cached or prefix keys before the first query."""
        return self.keys - self.queries

    def real(self) -> torch.Tensor | None:
        """Queries that may attend to themselves, (B | 1, Tq) bool: no padding. None means all of them."""
        if self.allowed is None:
            return None
        own = self.allowed.diagonal(self.offset, dim1=-2, dim2=-1).any(1)
        if (
            not self.trusted
        ):  # in a causal mask no query sees a later one; where one does, the keys are not a prefix + the queries
            later = self.allowed[..., self.offset :].triu(1).flatten(1).any(-1, keepdim=True)
            own = own & ~later
        return own


@dataclass
class BlockView:
    """A flex-attention `BlockMask`: the same questions answered without a (B, Tq, Tk) tensor."""

    mask_mod: Callable[..., torch.Tensor]
    batch: int
    queries: int
    keys: int
    device: torch.device
    owner: Any  # the BlockMask, on which the answers are kept: one mask object serves every layer of a forward
    spared: torch.Tensor | None = None

    @property
    def offset(self) -> int:
        return self.keys - self.queries

    def _ask(self, name: str, question: Callable[..., torch.Tensor], keys: int) -> torch.Tensor:
        """(B, Tq) bool: whether `question(b, h, q, k)` holds for any of `keys`; asked 128 queries at a time, once a
        mask."""
        answers = self.owner.__dict__.setdefault("_hf_reg_answers", {})
        if name not in answers:
            from torch.nn.attention.flex_attention import create_mask

            def rows(start: int) -> torch.Tensor:
                def shifted(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
                    return question(b, h, q + start, k)

                size = min(128, self.queries - start)
                return create_mask(shifted, self.batch, 1, size, keys, self.device).any(-1)[:, 0]

            answers[name] = torch.cat([rows(start) for start in range(0, self.queries, 128)], dim=-1)
        return answers[name]

    def real(self) -> torch.Tensor:
        return self._ask("real", lambda b, h, q, k: self.mask_mod(b, h, q, q + self.offset), 1)

    def lonely(self) -> torch.Tensor:
        """Queries that see no key but themselves."""
        return ~self._ask("others", lambda b, h, q, k: self.mask_mod(b, h, q, k) & (k != q + self.offset), self.keys)


def is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """What sdpa takes an attention without a mask for."""
    keyword = kwargs.get("is_causal")
    return bool(keyword if keyword is not None else getattr(module, "is_causal", True))


def spared_tokens(spared: torch.Tensor | None, batch: int, queries: int) -> torch.Tensor | None:
    """`spared`, once it is known to fit."""
    if spared is not None and spared.shape != (batch, queries):
        raise ValueError(
            f"The spared tokens have shape {tuple(spared.shape)}, but the attention sees {(batch, queries)} "
            f"queries: this "
            "module does not attend over `input_ids`. Leave `spare_token_ids` empty, or narrow `submodel=`."
        )
    return spared


def narrow(
    gate: Gate,
    implementation: str | None,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    prefix: bool,
    spared: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    """The mask to hand on instead of `mask`: `mask` without what `gate` hides, in the same convention.

    Left as it is where the queries are not the last keys (pooled or merged keys), since there token i of the queries
    is not token i of the keys.
    """
    refuse_backend(gate.patch.name, implementation)
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if keys < queries or (keys > queries and not prefix):
        return mask
    spared = spared_tokens(spared, batch, queries)
    if (
        mask is not None
        and not isinstance(mask, torch.Tensor)
        or (mask is None and implementation == "flex_attention")
    ):
        return _narrow_blocks(gate, mask, batch, queries, keys, query.device, spared)
    causal = is_causal(module, kwargs)
    allowed = None
    if mask is None:
        if implementation == "sdpa" and causal and queries > 1:
            if keys != queries:  # a static cache being filled: the keys beyond the queries are empty
                return mask
            allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril()
    else:
        mask = mask[..., :keys].expand(-1, -1, queries, -1)
        allowed = mask if mask.dtype == torch.bool else mask > BLOCKED
    view = TokenView(allowed, batch, queries, keys, query.device, keys == queries or not causal, spared)
    visible = gate.hide(view)
    if mask is None and implementation == "eager":
        mask = torch.zeros((), dtype=query.dtype, device=query.device)
    if mask is None or mask.dtype == torch.bool:
        return visible
    return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def narrow_scores(gate: Gate, scores: torch.Tensor, spared: torch.Tensor | None) -> torch.Tensor:
    """The same for attention scores (B, H, Tq, Tk) to which the model has already added its mask."""
    batch, _, queries, keys = scores.shape
    if queries != keys:
        return scores
    view = TokenView(
        scores > BLOCKED, batch, queries, keys, scores.device, spared=spared_tokens(spared, batch, queries)
    )
    return scores.masked_fill(~gate.hide(view), torch.finfo(scores.dtype).min)


def _narrow_blocks(
    gate: Gate, mask: Any, batch: int, queries: int, keys: int, device: torch.device, spared: torch.Tensor | None
) -> Any:
    """A `BlockMask` narrowed by a `mask_mod`. Its blocks stay: a block that was full is now evaluated like a partial
    one."""
    from torch.nn.attention.flex_attention import BlockMask, and_masks, noop_mask

    if mask is None:
        rows, columns = -(-queries // 128), -(-keys // 128)
        counts = torch.full((1, 1, rows), columns, dtype=torch.int32, device=device)
        indices = torch.arange(columns, dtype=torch.int32, device=device).expand(1, 1, rows, columns).contiguous()
        mask = BlockMask.from_kv_blocks(counts, indices, mask_mod=noop_mask, seq_lengths=(queries, keys))
    blocks = mask.__dict__.get("_hf_reg_blocks")
    if blocks is None:
        dense = mask.to_dense()
        blocks = dense.sum(-1, dtype=torch.int32), dense.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        mask._hf_reg_blocks = blocks
    view = BlockView(mask.mask_mod, batch, queries, keys, device, mask, spared)
    return BlockMask.from_kv_blocks(
        blocks[0],
        blocks[1],
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=and_masks(mask.mask_mod, gate.hide_blocks(view)),
        seq_lengths=(queries, keys),
    )
