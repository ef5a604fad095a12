"""Terms of the loss on a few rows of logits, each with its gradient, in one pass and in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..penalties.rows import LOWEST
from ..penalties.truncation import TopLogits, rest


__all__ = ["TERMS", "RowWeights", "row_terms"]

TERMS = ("task", "consistency", "diversity", "confidence")
BLOCK = 64  # columns: the top K lie in the K blocks with the largest maxima


@dataclass(frozen=True)
class RowWeights:
    """What each term of a row is multiplied with; a term of weight 0 is not computed.

    Args:
        task (`torch.Tensor` of shape `()`): on the cross-entropy.
        consistency, diversity, confidence (`float`): on the functions of `hf_reg.penalties` of these names.
        temperature (`float`): of the consistency.
        top_k (`int`): of the diversity.
    """

    task: torch.Tensor
    consistency: float = 0.0
    diversity: float = 0.0
    confidence: float = 0.0
    temperature: float = 2.0
    top_k: int = 20


def largest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest of each row and their columns, largest first, as `topk` finds them, in less time."""
    rows, width = logits.shape
    blocks = width // BLOCK
    if blocks <= 2 * k:
        values, columns = logits.topk(k, dim=-1)
        return values, columns
    whole = logits[:, : blocks * BLOCK].view(rows, blocks, BLOCK)
    chosen = whole.amax(-1).topk(k, dim=-1).indices
    columns = (chosen[..., None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    tail = torch.arange(blocks * BLOCK, width, device=logits.device).expand(rows, -1)
    columns = torch.cat([columns, tail], dim=1)
    values, places = logits.gather(1, columns).topk(k, dim=-1)
    return values, columns.gather(1, places)


def row_terms(
    logits: torch.Tensor, labels: torch.Tensor, weights: RowWeights, teacher: torch.Tensor | TopLogits | None
) -> torch.Tensor:
    """Unweighted terms of each row; `logits` are overwritten by the gradient of the weighted sum.

    Args:
        logits (`torch.Tensor` of shape `(m, V)`): fp32 at least.
        labels (`torch.LongTensor` of shape `(m,)`): the column that the cross-entropy wants.
        weights ([`RowWeights`]).
        teacher (`torch.Tensor` of shape `(m, V)` or [`TopLogits`] of m rows, *optional*):
            logits, overwritten too; for the consistency.

    Returns:
        `torch.Tensor` of shape `(4, m)`: in the order of [`TERMS`], 0 where a weight is 0.
    """
    found = logits.new_zeros(len(TERMS), len(logits))
    temperature = weights.temperature
    if weights.diversity:
        top, top_columns = largest(logits, min(weights.top_k, logits.shape[-1]))
        highest = top[:, :1]
    else:
        highest = logits.amax(-1, keepdim=True)
    target = logits.gather(1, labels[:, None])
    tempered = shifted = None
    if weights.consistency:
        tempered = torch.sub(logits, highest).mul_(1 / temperature).exp_()
        tempered_sum = tempered.sum(-1, keepdim=True)
    if tempered is not None and temperature in (1.0, 2.0):  # exp(z) is a power of exp(z / T)
        raised = tempered.square() if temperature == 2.0 else tempered.clone()
    else:
        raised = torch.sub(logits, highest).exp_()
    raised_sum = raised.sum(-1, keepdim=True)
    log_sum = raised_sum.log()
    found[0] = (highest + log_sum - target)[:, 0]
    if weights.confidence:
        shifted = torch.sub(logits, highest).sub_(log_sum)  # log-probabilities
        negative = (shifted * raised).sum(-1, keepdim=True) / raised_sum  # minus the entropy
        found[3] = negative[:, 0]
        shifted.sub_(negative).mul_(raised).mul_(weights.confidence / raised_sum)

    scale, likely, seen = weights.consistency * temperature, None, None
    if tempered is not None and isinstance(teacher, torch.Tensor):
        teacher_highest = teacher.amax(-1, keepdim=True)
        likely = torch.sub(teacher, teacher_highest).mul_(1 / temperature).exp_()
        likely_sum = likely.sum(-1, keepdim=True)
        likely.div_(likely_sum)
        mean = teacher.sub_(logits).mul_(likely).sum(-1)
        offset = (highest - teacher_highest) / temperature + (tempered_sum.log() - likely_sum.log())
        found[1] = temperature**2 * (mean / temperature + offset[:, 0])
    elif tempered is not None and isinstance(teacher, TopLogits):
        seen = (logits.gather(1, teacher.indices.long()) - highest) / temperature - tempered_sum.log()

    slope = torch.mul(raised, weights.task / raised_sum, out=logits)
    if likely is not None and tempered is not None:
        slope.addcmul_(tempered, scale / tempered_sum).add_(likely, alpha=-scale)
    elif seen is not None and tempered is not None:
        assert isinstance(teacher, TopLogits)
        found[1] = temperature**2 * _truncated(slope, teacher, tempered, tempered_sum, seen, scale, temperature)
    if shifted is not None:
        slope.add_(shifted)
    if weights.diversity:
        log_q = top.log_softmax(-1)
        negative = (log_q.exp() * log_q).sum(-1, keepdim=True)
        found[2] = negative[:, 0]
        slope.scatter_add_(1, top_columns, log_q.exp().mul_(log_q - negative).mul_(weights.diversity))
    slope.scatter_add_(1, labels[:, None], -weights.task.to(slope.dtype).expand(len(labels), 1))
    return found


def _truncated(
    slope: torch.Tensor,
    teacher: TopLogits,
    tempered: torch.Tensor,
    total: torch.Tensor,
    log_q: torch.Tensor,
    scale: float,
    temperature: float,
) -> torch.Tensor:
    """The divergence over k + 1 events of each row, (m,); adds its gradient, times `scale`, to `slope` and takes the
    top out of `tempered`, the student's exp(z / T) with the sum `total`; `log_q` (m, k) is of the top."""
    columns, log_p = teacher.indices.long(), teacher.log_probabilities(temperature)
    value = (log_p.exp() * (log_p - log_q)).sum(-1)
    if columns.shape[-1] < slope.shape[-1]:
        others = tempered.scatter_(1, columns, 0.0).sum(-1, keepdim=True) / total
        log_rest = rest(log_p)[:, None]
        value = value + (log_rest.exp() * (log_rest - others.log().clamp(min=LOWEST)))[:, 0]
        ratio = torch.where(others > 0, log_rest.exp() / others, 0.0)
        slope.addcmul_(tempered, (1 - ratio) * scale / total)
    slope.scatter_add_(1, columns, (log_q.exp() - log_p.exp()) * scale)
    return value
