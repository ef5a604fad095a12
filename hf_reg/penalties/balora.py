"""BA-LoRA's consistency and diversity terms (arXiv 2408.04556 v6); its third is in `spectrum.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_reg.base import check_choice, check_range
from hf_reg.schedules import cosine, two_phase

from .answers import LogitsPenalty
from .precision import exactly, widen
from .rows import log_probabilities, mean_entropy, mean_over_rows, rows
from .spectrum import SvdConcentration


__all__ = ["Consistency", "Covariance", "Diversity", "ba_lora", "consistency", "covariance", "diversity"]


def consistency(
    student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 2.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """T^2 * mean over rows of KL(softmax(teacher / T) || softmax(student / T)): L_CR of BA-LoRA v6.

    Args:
        student (`torch.Tensor` of shape `(N, D)` or `(B, T, V)`): logits.
        teacher (`torch.Tensor` of the same shape): logits; no gradient flows into them.
        temperature (`float`, *optional*, defaults to 2.0): T, of the authors' script for language models.
        mask (`torch.BoolTensor` of shape `(N,)` or `(B, T)`, *optional*): the rows that count; none gives 0.

    Raises:
        `ValueError`: for `temperature <= 0` and shapes that do not fit. `TypeError`: for a mask that is not bool.
    """
    if not temperature > 0:
        raise ValueError(f"consistency: temperature={temperature} is out of range; give temperature > 0.")
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}: expected the same shape.")
    log_p = log_probabilities(rows(teacher.detach(), mask), temperature)
    log_q = log_probabilities(rows(student, mask), temperature)
    return temperature**2 * mean_over_rows((log_p.exp() * (log_p - log_q)).sum(-1))


def covariance(logits: torch.Tensor) -> torch.Tensor:
    """(1 / D) * sum over i != j of C_ij^2, C the covariance of the columns: L_DR of BA-LoRA v6 for classification.

    D x D is never formed when there are fewer rows than columns.

    Args:
        logits (`torch.Tensor` of shape `(N, D)`): with fewer than two rows the result is 0.

    Raises:
        `ValueError`: unless `logits` has two dimensions.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits {tuple(logits.shape)}: expected (N, D); pass logits[mask] for those of tokens.")
    n, d = logits.shape
    if n < 2 or d == 0:
        return widen(logits[:0]).sum()
    with exactly(logits):
        wide = widen(logits)
        centred = (wide - wide.mean(0)) / (n - 1) ** 0.5
        variances = centred.square().sum(0)
        if d <= n:
            return (centred.mT @ centred - torch.diag(variances)).square().sum() / d
        return ((centred @ centred.mT).square().sum() - variances.square().sum()) / d


def diversity(logits: torch.Tensor, *, top_k: int | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
    """L_DR of BA-LoRA v6: lower is more diverse.

    - Classification, `(N, D)` without `top_k`: [`covariance`] of the rows.
    - Language modelling, `(B, T, V)` or with `top_k`: minus the mean entropy of the softmax renormalised over each
      row's own `top_k` largest logits (all of them if None), with the gradient through their values. The sign is that
      of the definition: the authors' code of August 2024 minimised the entropy.

    Args:
        logits (`torch.Tensor` of shape `(N, D)` or `(B, T, V)`).
        top_k (`int`, *optional*): at least 1 and at most the number of columns.
        mask (`torch.BoolTensor` of shape `(N,)` or `(B, T)`, *optional*): the rows that count; none gives 0.

    Raises:
        `ValueError`: for a `top_k` out of range and shapes that do not fit. `TypeError`: for a mask that is not bool.
    """
    selected = rows(logits, mask)
    if top_k is None:
        return covariance(selected) if logits.dim() == 2 else -mean_entropy(selected)
    if not 1 <= top_k <= selected.shape[-1]:
        raise ValueError(f"diversity: top_k={top_k} is out of range; give 1 <= top_k <= {selected.shape[-1]}.")
    return -mean_entropy(selected.topk(top_k, dim=-1).values)


@dataclass(eq=False)
class Consistency(LogitsPenalty):
    """The student stays near the pretrained model: tempered KL to `outputs.teacher`, see [`consistency`].

    Published weights (BA-LoRA v6): 0.025 for language models, 0.15 for classification (temperature not verified
    there), with `schedule=cosine(1.0, 0.1)`; [`ba_lora`] sets them.

    Args:
        temperature (`float`, *optional*, defaults to 2.0): of the authors' script for language models.
        shift, weight, schedule, name: see [`LogitsPenalty`].
    """

    NAME: ClassVar[str] = "consistency"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"logits", "teacher"})

    temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "temperature", self.temperature, 1e-6, float("inf"))

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        logits, teacher = self.find_logits(outputs), self.find_logits(outputs, "teacher")
        return consistency(logits, teacher, temperature=self.temperature, mask=self.mask(model, inputs, logits))


@dataclass(eq=False)
class Diversity(LogitsPenalty):
    """Predictions stay diverse, see [`diversity`]: entropy of the top K for tokens, covariance for examples.

    Published weights (BA-LoRA v6): 0.005 for language models, 0.03 for classification, with `schedule="two_phase"`;
    [`ba_lora`] sets them.

    Args:
        top_k (`int`, *optional*, defaults to 20):
            K of the paper, used for tokens only and at most the number of classes; `None`: the full softmax.
        shift, weight, schedule, name: see [`LogitsPenalty`].
    """

    NAME: ClassVar[str] = "diversity"

    top_k: int | None = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None:
            check_range(self.name, "top_k", self.top_k, 1, float("inf"))

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        logits = self.find_logits(outputs)
        top_k = None if logits.dim() == 2 or self.top_k is None else min(self.top_k, logits.shape[-1])
        return diversity(logits, top_k=top_k, mask=self.mask(model, inputs, logits))


@dataclass(eq=False)
class Covariance(LogitsPenalty):
    """The classes stay uncorrelated, see [`covariance`]; of tokens, the rows that count. Weights: see [`Diversity`].

    Args:
        shift, weight, schedule, name: see [`LogitsPenalty`].
    """

    NAME: ClassVar[str] = "covariance"

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        logits = self.find_logits(outputs)
        return covariance(rows(logits, self.mask(model, inputs, logits)))


def ba_lora(task: str = "nlg") -> list[LogitsPenalty]:
    """The three terms of BA-LoRA v6 (arXiv 2408.04556) with their published weights and schedules.

    Args:
        task (`str`, *optional*, defaults to `"nlg"`): `"nlg"` for language models, `"nlu"` for classification.

    Raises:
        `ValueError`: for another `task`.
    """
    check_choice("ba_lora", "task", task, ("nlg", "nlu"))
    first, other = (0.025, 0.005) if task == "nlg" else (0.15, 0.03)
    return [
        Consistency(weight=first, schedule=cosine(1.0, 0.1)),
        Diversity(weight=other, schedule=two_phase()),
        SvdConcentration(weight=other, schedule=two_phase()),
    ]
