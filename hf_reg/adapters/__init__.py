"""Adapters on PEFT that begin at the singular vectors of the weights they adapt, and their tools."""

from .balora import BALoraConfig
from .drift import SpectrumDrift, spectrum_drift
from .merging import MergeReport, merge_adapter
from .model import get_regularized_peft_model
from .sorsa import SorsaConfig, orthonormal_step
from .svd import Factors, decompose, decompose_layers


__all__ = [
    "BALoraConfig", "Factors", "MergeReport", "SorsaConfig", "SpectrumDrift", "decompose", "decompose_layers",
    "get_regularized_peft_model", "merge_adapter", "orthonormal_step", "spectrum_drift",
]  # fmt: skip
