"""Penalties: terms of the loss, each as a pure function of tensors and as a [`~hf_reg.base.Penalty`] over it."""

from hf_reg.base import Penalty

from .anchored import L2SP
from .answers import LogitsPenalty, answer_mask
from .balora import (
    Consistency,
    Covariance,
    Diversity,
    ba_lora,
    consistency,
    covariance,
    diversity,
    normalized_mse,
)
from .elastic import EWC, fisher_information
from .entropy import Confidence, confidence
from .frobenius import FrobeniusDecay, frobenius_product
from .norms import L1, L2
from .orthonormal import Orthonormality, orthonormality
from .spectrum import SvdConcentration, svd_concentration
from .truncation import TopLogits, top_logits, truncated_consistency
from .two_passes import RDrop, symmetric_kl


__all__ = [
    "EWC", "L1", "L2", "L2SP", "PENALTIES", "Confidence", "Consistency", "Covariance", "Diversity", "FrobeniusDecay",
    "LogitsPenalty", "Orthonormality", "RDrop", "SvdConcentration", "TopLogits", "answer_mask", "ba_lora",
    "confidence", "consistency", "covariance", "diversity", "fisher_information", "frobenius_product",
    "normalized_mse", "orthonormality", "svd_concentration", "symmetric_kl", "top_logits", "truncated_consistency",
]  # fmt: skip

PENALTIES: dict[str, type[Penalty]] = {
    cls.NAME: cls
    for cls in (
        Orthonormality, Consistency, Diversity, Covariance, SvdConcentration, FrobeniusDecay, L2SP, EWC, RDrop,
        Confidence, L1, L2,
    )
}  # fmt: skip
