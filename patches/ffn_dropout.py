"""FFN dropout: dropout on the activation between the projections of an FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_reg.base import Patch, RateGate, check_range
from hf_reg.sites.ffn import FfnSite


__all__ = ["FfnDropout"]


@dataclass(frozen=True)
class FfnDropout(Patch):
    """FFN dropout: dropout on the activation between the up- and the down-projection of every FFN, which the classes
    of most models do not have.

    From *Dropout: A Simple Way to Prevent Neural Networks from Overfitting* (JMLR 15, 2014, section 4), at the place
    that fairseq calls `activation_dropout` and T5 uses as a rule. Units are dropped one by one and the others scaled
    by 1 / (1 - p). In a gated FFN it acts on the product of gate and value; in fused experts on the activated gate,
    which is the same. Evaluation is untouched. It comes in addition to dropout that the model has at this place.

    Args:
        p (`float`, *optional*, defaults to 0.1): probability to drop a unit, in [0, 1). T5's `dropout_rate`.
        layers, submodel, schedule: see [`Patch`].
    """

    name: ClassVar[str] = "ffn_dropout"
    formula: ClassVar[str] = "h_j <- m_j h_j / (1 - p), m_j ~ Bernoulli(1 - p), h the activation of the FFN"
    seam: ClassVar[str] = "ffn"
    acts_on: ClassVar[str] = "an FFN"
    rate_field: ClassVar[str] = "p"
    drops: ClassVar[str] = "ffn"

    p: float = 0.1

    def __post_init__(self) -> None:
        check_range("ffn_dropout", "p", self.p, 0, 1)
        super().__post_init__()

    def gate(self, site: FfnSite) -> FfnDropoutGate:
        return FfnDropoutGate(self)


class FfnDropoutGate(RateGate):
    """Drops units of one FFN."""

    def transform(self, states: torch.Tensor) -> torch.Tensor:
        return self.drop(states)
