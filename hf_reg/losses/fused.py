"""The loss of a causal language model and the penalties on its logits, in one pass over chunks of rows.

Logits of all positions, (B, T, V), are never formed: a chunk of rows gives its part of every term and, since the
weights of the terms are known beforehand, the gradient of their weighted sum at the hidden states at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..penalties.precision import exactly
from ..penalties.truncation import TopLogits, top_logits
from .heads import LinearHead
from .row_terms import TERMS, RowWeights, row_terms


__all__ = ["fused_loss", "top_logits_of"]

# logits of a chunk, which is multiplied at once, and of a block of it, whose terms are computed while it is in cache
CHUNK = {"cpu": 1 << 23}
BLOCK = {"cpu": 1 << 19}
ELSEWHERE = 1 << 25


def parts(rows: int, width: int, device: torch.device, sizes: dict[str, int]) -> Iterator[slice]:
    size = max(sizes.get(device.type, ELSEWHERE) // width, 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def buffer(rows: int, head: LinearHead) -> torch.Tensor:
    width, device = len(head.weight), head.weight.device
    largest = next(parts(rows, width, device, CHUNK), slice(0, 0)).stop
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    return torch.empty(largest, width, dtype=dtype, device=device)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: LinearHead, weights: RowWeights, teacher: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width, device = len(head.weight), hidden.device
        student, other = buffer(len(hidden), head), None
        if isinstance(teacher, torch.Tensor):
            other = torch.empty_like(student)
        values = student.new_zeros(len(TERMS), len(hidden))
        slope = torch.empty_like(hidden)
        for chunk in parts(len(hidden), width, device, CHUNK):
            logits = head.logits(hidden[chunk], student)
            kept = logits.clone() if head.cap is not None else None
            shown = None if other is None else head.logits(teacher[chunk], other)
            for block in parts(len(logits), width, device, BLOCK):
                part = slice(chunk.start + block.start, chunk.start + block.stop)
                compared = shown[block] if shown is not None else _rows(teacher, part)
                values[:, part] = row_terms(logits[block], labels[part], weights, compared)
            slope[chunk] = head.gradient(logits, kept)
        factors = [weights.task.to(values.dtype)]
        factors += [
            values.new_tensor(weight) for weight in (weights.consistency, weights.diversity, weights.confidence)
        ]
        terms = values.sum(-1) * torch.stack([factor.to(device) for factor in factors])
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(terms)
        return terms.sum(), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grad.to(slope.dtype), None, None, None, None


def _rows(teacher: TopLogits | None, part: slice) -> TopLogits | None:
    if teacher is None:
        return None
    return TopLogits(teacher.values[part], teacher.indices[part], teacher.logsumexp[part])


def fused_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: LinearHead,
    weights: RowWeights,
    teacher: torch.Tensor | TopLogits | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum over rows of cross-entropy, consistency, diversity and confidence.

    Args:
        hidden (`torch.Tensor` of shape `(M, d)`): what enters the head at the positions that count.
        labels (`torch.LongTensor` of shape `(M,)`): the token that each of them predicts.
        head ([`LinearHead`]): frozen.
        weights ([`RowWeights`]): of a row of each term, so a mean over rows has 1 / M in it.
        teacher (`torch.Tensor` of shape `(M, d)` or [`TopLogits`] of M rows, *optional*):
            what enters the head of the teacher, which is the same head, or the teacher's largest logits.

    Returns:
        `(torch.Tensor, dict)`: the sum, with its gradient, and the weighted terms by name, without. Only the sum has a
        gradient: it was computed for these weights.

    Raises:
        `ValueError`: for a consistency without a teacher, or shapes that do not fit.
    """
    if weights.consistency and teacher is None:
        raise ValueError("fused_loss: the consistency compares with a teacher; pass its hidden states or TopLogits.")
    count = len(teacher.values) if isinstance(teacher, TopLogits) else len(hidden if teacher is None else teacher)
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1] or not len(hidden) == len(labels) == count:
        raise ValueError(
            f"fused_loss: hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}, {count} rows of the teacher; "
            f"expected (M, {head.weight.shape[1]}), (M,) and M rows."
        )
    if not weights.consistency:
        teacher = None
    with exactly(hidden):
        total, terms = _Fused.apply(hidden, labels, head, weights, teacher)
    return total, dict(zip(TERMS, terms, strict=True))


@torch.no_grad()
def top_logits_of(hidden: torch.Tensor, head: LinearHead, k: int, temperature: float) -> TopLogits:
    """[`top_logits`] of what `head` makes of `hidden` (M, d), a chunk at a time."""
    out, found = buffer(len(hidden), head), []
    with exactly(hidden):
        for chunk in parts(len(hidden), len(head.weight), hidden.device, CHUNK):
            found.append(top_logits(head.logits(hidden[chunk], out), k, temperature))
    if not found:
        found.append(top_logits(out, k, temperature))
    return TopLogits(*(torch.cat([getattr(one, name) for one in found]) for name in TopLogits.__annotations__))
