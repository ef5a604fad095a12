"""BA-LoRA's consistency and diversity terms (arXiv 2408.04556); its third is in `spectrum.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from .truncation import TopLogits, truncated_consistency


__all__ = [
    "Consistency", "Covariance", "Diversity", "ba_lora", "consistency", "covariance", "diversity", "normalized_mse",
]  # fmt: skip

FORMS = ("kl", "mse")


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


def _unit(logits: torch.Tensor) -> torch.Tensor:
    norms = torch.linalg.vector_norm(logits, dim=-1, keepdim=True)
    return logits / torch.where(norms > 0, norms, 1.0)


def normalized_mse(student: torch.Tensor, teacher: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over rows and columns of (z / ||z|| - z' / ||z'||)^2: the consistency of BA-LoRA v5 for classification.

    The paper writes `normalize`; that each row is scaled to unit length is our reading. A row of zeros stays.

    Args:
        student (`torch.Tensor` of shape `(N, D)` or `(B, T, V)`): logits.
        teacher (`torch.Tensor` of the same shape): logits; no gradient flows into them.
        mask (`torch.BoolTensor` of shape `(N,)` or `(B, T)`, *optional*): the rows that count; none gives 0.

    Raises:
        `ValueError`: for shapes that do not fit. `TypeError`: for a mask that is not bool.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}: expected the same shape.")
    difference = _unit(rows(student, mask)) - _unit(rows(teacher.detach(), mask))
    return mean_over_rows(difference.square().mean(-1))


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
    """The student stays near the pretrained model, `outputs.teacher`: see [`consistency`] and [`normalized_mse`].

    Published weights (BA-LoRA v6): 0.025 for language models, 0.15 for classification (temperature not verified
    there), with `schedule=cosine(1.0, 0.1)`; [`ba_lora`] sets them. From a cache of teacher logits, the value is
    [`truncated_consistency`].

    Args:
        temperature (`float`, *optional*, defaults to 2.0): of the authors' script for language models; of `"kl"` only.
        form (`str`, *optional*, defaults to `"kl"`): `"kl"`, or `"mse"` of normalised logits.
        shift, weight, schedule, name: see [`LogitsPenalty`].
    """

    NAME: ClassVar[str] = "consistency"
    FORMULA: ClassVar[str] = "T^2 mean over rows of KL(softmax(z_teacher / T) || softmax(z / T))"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"logits", "teacher"})

    temperature: float = 2.0
    form: str = "kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "temperature", self.temperature, 1e-6, float("inf"))
        check_choice(self.name, "form", self.form, FORMS)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        logits = self.find_logits(outputs)
        mask = self.mask(model, inputs, logits)
        if isinstance(getattr(outputs, "teacher", None), TopLogits):
            return truncated_consistency(logits, outputs.teacher, temperature=self.temperature, mask=mask)
        teacher = self.find_logits(outputs, "teacher")
        if self.form == "mse":
            return normalized_mse(logits, teacher, mask=mask)
        return consistency(logits, teacher, temperature=self.temperature, mask=mask)


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
    FORMULA: ClassVar[str] = "- mean over tokens of H(softmax(top K of z)); of examples, the covariance term"

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
    FORMULA: ClassVar[str] = "(1 / D) sum over i != j of C_ij^2, C the covariance of the logits"

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        logits = self.find_logits(outputs)
        return covariance(rows(logits, self.mask(model, inputs, logits)))


def ba_lora(
    task: str = "nlg",
    *,
    version: str = "iclr2026",
    lambdas: Sequence[float] | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    k: int | None = None,
) -> list[LogitsPenalty]:
    """The three terms of BA-LoRA (arXiv 2408.04556): consistency, diversity, concentration of singular values.

    | | `"iclr2026"` (v6) | `"v5"` (v3 to v5) |
    |---|---|---|
    | consistency | tempered KL | tokens: KL; classification: [`normalized_mse`] |
    | diversity of tokens | entropy of the top 20 | entropy of the whole vocabulary |
    | singular values | top 10 / Frobenius; classification: top 5 / all | top 3 / all |
    | lambdas | 0.025, 0.005, 0.005; classification: 0.15, 0.03, 0.03 | 1e-4, 3e-4, 1e-4 |
    | schedules | cosine to a tenth; two-phase for the others | none |

    Diversity in classification is [`covariance`] in both. Means are over answer tokens: the code of v5 divides by the
    number of examples instead and counts padding, which is not its definition.

    Args:
        task (`str`, *optional*, defaults to `"nlg"`): `"nlg"` for language models, `"nlu"` for classification.
        version (`str`, *optional*, defaults to `"iclr2026"`): `"iclr2026"` or `"v5"`.
        lambdas (sequence of three `float`, *optional*): weights of the terms; `None`: those of the table.
        temperature (`float`, *optional*): of the KL; `None`: 2 in v6 (for classification unverified), 1 in v5.
        top_k (`int`, *optional*): of the diversity of tokens; `None`: that of the table.
        k (`int`, *optional*): singular values in the numerator; `None`: that of the table.

    Raises:
        `ValueError`: for an unknown `task` or `version`, `lambdas` that are not three numbers >= 0, a setting out of
        range, and a setting that this task and version have no use for.
    """
    check_choice("ba_lora", "task", task, ("nlg", "nlu"))
    check_choice("ba_lora", "version", version, ("iclr2026", "v5"))
    tokens, latest = task == "nlg", version == "iclr2026"
    if lambdas is None:
        lambdas = ((0.025, 0.005, 0.005) if tokens else (0.15, 0.03, 0.03)) if latest else (1e-4, 3e-4, 1e-4)
    if isinstance(lambdas, (str, float, int)) or len(lambdas) != 3:
        raise ValueError(f"ba_lora: lambdas={lambdas!r}: expected three weights, such as (0.025, 0.005, 0.005).")
    if top_k is not None and not tokens:
        raise ValueError(f"ba_lora: top_k={top_k} has no use in 'nlu', a covariance; leave it out.")
    if temperature is not None and not tokens and not latest:
        raise ValueError(f"ba_lora: temperature={temperature} has no use in 'nlu' of 'v5', an MSE; leave it out.")
    first, other = (cosine(1.0, 0.1), two_phase()) if latest else (None, None)
    return [
        Consistency(
            weight=lambdas[0],
            schedule=first,
            temperature=(2.0 if latest else 1.0) if temperature is None else temperature,
            form="kl" if latest or tokens else "mse",
        ),
        Diversity(weight=lambdas[1], schedule=other, top_k=20 if latest and top_k is None else top_k),
        SvdConcentration(
            weight=lambdas[2],
            schedule=other,
            k=3 if k is None and not latest else k,
            norm=None if latest else "nuclear",
        ),
    ]
