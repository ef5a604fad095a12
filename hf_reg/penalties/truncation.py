"""A teacher that is known by its k largest logits a row, and the consistency with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rows import LOWEST, log_probabilities, mean_over_rows, rows


__all__ = ["TopLogits", "top_logits", "truncated_consistency"]


@dataclass(frozen=True)
class TopLogits:
    """What is kept of M rows of a teacher's logits.

    Args:
        values (`torch.Tensor` of shape `(M, k)`): the largest logits of each row, fp32.
        indices (`torch.IntTensor` of shape `(M, k)`): their columns.
        logsumexp (`torch.Tensor` of shape `(M,)`): of all logits of the row divided by the temperature, fp32.
    """

    values: torch.Tensor
    indices: torch.Tensor
    logsumexp: torch.Tensor

    def log_probabilities(self, temperature: float) -> torch.Tensor:
        """Of the k columns at the temperature of `logsumexp`, (M, k)."""
        return (self.values / temperature - self.logsumexp[:, None]).clamp(min=LOWEST, max=0)


def top_logits(logits: torch.Tensor, k: int, temperature: float) -> TopLogits:
    """The `k` largest of each row of `logits` (M, V), all of them if there are fewer."""
    values, indices = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return TopLogits(values, indices.int(), torch.logsumexp(logits / temperature, dim=-1))


def rest(log_probabilities: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of the probabilities of each row), (M,); where rounding leaves nothing, `LOWEST`."""
    left = 1 - log_probabilities.exp().sum(-1)
    # what rounding leaves of k probabilities that are all there are
    nothing = left <= 8 * torch.finfo(left.dtype).eps
    return torch.where(nothing, LOWEST, torch.where(nothing, 1.0, left).log())


def truncated_consistency(
    student: torch.Tensor, teacher: TopLogits, *, temperature: float = 2.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """T^2 * mean over rows of the KL between teacher and student over k + 1 events: the teacher's k likeliest columns,
    and all others together.

    It is [`consistency`] where k is the number of columns, and otherwise at most that (the data-processing
    inequality: events that are put together can only become harder to tell apart).

    Args:
        student (`torch.Tensor` of shape `(N, D)` or `(B, T, V)`): logits.
        teacher ([`TopLogits`] of M rows): of the rows of `student` that count, at this temperature.
        temperature (`float`, *optional*, defaults to 2.0): T.
        mask (`torch.BoolTensor` of shape `(N,)` or `(B, T)`, *optional*): the M rows that count; none gives 0.

    Raises:
        `ValueError`: if the number of rows differs.
    """
    selected = rows(student, mask)
    if len(selected) != len(teacher.values):
        raise ValueError(f"{len(selected)} rows of the student count, but the teacher has {len(teacher.values)}.")
    log_q = log_probabilities(selected, temperature)
    log_p, columns = teacher.log_probabilities(temperature), teacher.indices.long()
    log_q_top = log_q.gather(-1, columns)
    divergence = (log_p.exp() * (log_p - log_q_top)).sum(-1)
    if columns.shape[-1] < selected.shape[-1]:
        others = log_q.scatter(-1, columns, LOWEST).logsumexp(-1)
        log_rest = rest(log_p)
        divergence = divergence + log_rest.exp() * (log_rest - others)
    return temperature**2 * mean_over_rows(divergence)
