"""R-Drop (arXiv 2106.14448): two passes through different dropout masks agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .answers import LogitsPenalty
from .rows import log_probabilities, mean_over_rows, rows


__all__ = ["RDrop", "symmetric_kl"]


def symmetric_kl(a: torch.Tensor, b: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over rows of (KL(p_a || p_b) + KL(p_b || p_a)) / 2 (R-Drop, arXiv 2106.14448, equation 2).

    The gradient flows into both.

    Args:
        a, b (`torch.Tensor` of shape `(N, D)` or `(B, T, V)`): logits.
        mask (`torch.BoolTensor` of shape `(N,)` or `(B, T)`, *optional*): the rows that count; none gives 0.

    Raises:
        `ValueError`: for shapes that do not fit. `TypeError`: for a mask that is not bool.
    """
    if a.shape != b.shape:
        raise ValueError(f"logits {tuple(a.shape)} and {tuple(b.shape)}: expected the same shape.")
    log_a, log_b = log_probabilities(rows(a, mask)), log_probabilities(rows(b, mask))
    return mean_over_rows(((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(-1)) / 2


@dataclass(eq=False)
class RDrop(LogitsPenalty):
    """R-Drop: the predictions of two passes with different dropout masks agree, see [`symmetric_kl`].

    From *R-Drop: Regularized Dropout for Neural Networks* (arXiv 2106.14448). The weight is the paper's alpha, chosen
    there per task (unverified: 0.1 to 5). The paper also takes the task loss on both passes; here it is taken on the
    first. In evaluation mode both passes are the same and the term is 0.

    Args:
        shift, weight, schedule, name: see [`LogitsPenalty`].
    """

    NAME: ClassVar[str] = "r_drop"
    FORMULA: ClassVar[str] = "mean over rows of (KL(p_a || p_b) + KL(p_b || p_a)) / 2"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"logits", "second_pass"})

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        logits, second = self.find_logits(outputs), self.find_logits(outputs, "second_pass")
        return symmetric_kl(logits, second, mask=self.mask(model, inputs, logits))
