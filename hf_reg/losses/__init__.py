"""Losses that are computed without whole logits."""

from .fused import fused_loss, top_logits_of
from .heads import CannotFuse, LinearHead, find_head, head_input, recognize
from .row_terms import RowWeights
from .spectrum import HeadSpectrum


__all__ = [
    "CannotFuse", "HeadSpectrum", "LinearHead", "RowWeights", "find_head", "fused_loss", "head_input", "recognize",
    "top_logits_of",
]  # fmt: skip
