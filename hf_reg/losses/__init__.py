"""Losses: of causal language models without whole logits, and of preferences."""

from .fused import fused_loss, top_logits_of
from .heads import CannotFuse, LinearHead, find_head, head_input, output_layer, recognize
from .logprobs import token_log_probs
from .row_terms import RowWeights
from .rpo import RPOLossOutput, rpo_loss, to_trl
from .spectrum import HeadSpectrum


__all__ = [
    "CannotFuse", "HeadSpectrum", "LinearHead", "RPOLossOutput", "RowWeights", "find_head", "fused_loss",
    "head_input", "output_layer", "recognize", "rpo_loss", "to_trl", "token_log_probs", "top_logits_of",
]  # fmt: skip
