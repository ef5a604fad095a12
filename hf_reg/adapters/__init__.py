"""Adapters on PEFT that begin at the singular vectors of the weights they adapt, and their tools."""

from .balora import BALoraConfig
from .model import get_regularized_peft_model
from .sorsa import SorsaConfig, orthonormal_step
from .svd import Factors, decompose, decompose_layers


__all__ = [
    "BALoraConfig", "Factors", "SorsaConfig", "decompose", "decompose_layers", "get_regularized_peft_model",
    "orthonormal_step",
]  # fmt: skip
