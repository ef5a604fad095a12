"""The confidence penalty (Pereyra et al. 2017, arXiv 1701.06548)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .answers import LogitsPenalty
from .rows import mean_entropy, rows


__all__ = ["Confidence", "confidence"]


def confidence(logits: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Minus the mean entropy of softmax(logits), in nats (arXiv 1701.06548, section 3). It needs no labels.

    Args:
        logits (`torch.Tensor` of shape `(N, D)` or `(B, T, V)`).
        mask (`torch.BoolTensor` of shape `(N,)` or `(B, T)`, *optional*): the rows that count; none gives 0.

    Raises:
        `ValueError`: for shapes that do not fit. `TypeError`: for a mask that is not bool.
    """
    return -mean_entropy(rows(logits, mask))


@dataclass(eq=False)
class Confidence(LogitsPenalty):
    """Penalizes over-confident predictions, see [`confidence`].

    From *Regularizing Neural Networks by Penalizing Confident Output Distributions* (arXiv 1701.06548). The default
    weight is not the paper's: its values depend on the task and could not be verified; 0.1 is a usual start.

    Args:
        shift, weight, schedule, name: see [`LogitsPenalty`].
    """

    NAME: ClassVar[str] = "confidence"
    FORMULA: ClassVar[str] = "- mean over rows of H(softmax(z))"

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        logits = self.find_logits(outputs)
        return confidence(logits, mask=self.mask(model, inputs, logits))
