"""Attention dropout: the model's own dropout of attention probabilities, at a rate of your own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from hf_reg.base import Patch, check_range
from hf_reg.seams.dropout import PlaceGate, refuse_flex
from hf_reg.sites.layers import DropoutSite


__all__ = ["AttentionDropout"]


@dataclass(frozen=True)
class AttentionDropout(Patch):
    """Attention dropout: the model's own dropout of attention probabilities at rate `p`, as a plain baseline.

    From *Attention Is All You Need* (NeurIPS 2017, arXiv 1706.03762): the paper's code, not its text, drops attention
    probabilities too. Entries of softmax(QK / sqrt(d)) are dropped one by one and the others scaled by 1 / (1 - p). It
    *replaces* the rate that the model has, through the model's own code; that and the configuration are as before
    after `unpatch_model`. `set_dropout(model, attention=p)` does the same for good, configuration included. On a CPU
    the masks are drawn and applied by code of our own (`hf_reg/seams/dropped.py`), which is faster than sdpa's.

    Args:
        p (`float`, *optional*, defaults to 0.1): probability to drop an entry, in [0, 1). BERT's.
        layers, submodel, schedule: see [`Patch`].
    """

    name: ClassVar[str] = "attention_dropout"
    formula: ClassVar[str] = "P <- m P / (1 - p), m_ij ~ Bernoulli(1 - p), P the attention probabilities"
    seam: ClassVar[str] = "dropout"
    acts_on: ClassVar[str] = "of attention probabilities"
    rate_field: ClassVar[str] = "p"

    p: float = 0.1

    def __post_init__(self) -> None:
        check_range("attention_dropout", "p", self.p, 0, 1)
        super().__post_init__()

    def accepts(self, site: Any) -> bool:
        return isinstance(site, DropoutSite) and site.kind == "attention"

    def check(self, model: nn.Module, site: DropoutSite) -> None:
        refuse_flex(self.name, site)

    def gate(self, site: DropoutSite) -> PlaceGate:
        return PlaceGate(self, site.how)
