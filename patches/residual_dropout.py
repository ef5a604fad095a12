"""Residual dropout: dropout on what attention and FFN add to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_reg.base import Patch, RateGate, check_choice, check_range
from hf_reg.sites.residual import BranchSite


__all__ = ["ResidualDropout"]


@dataclass(frozen=True)
class ResidualDropout(Patch):
    """Residual dropout: dropout on the output of attention and FFN, before it is added to the residual stream.

    From *Attention Is All You Need* (NeurIPS 2017, arXiv 1706.03762, section 5.4), for the models whose class has
    none (Llama, Mistral, Qwen, Gemma). Units are dropped one by one and the others scaled by 1 / (1 - p). Evaluation
    is untouched. It comes in addition to dropout that the model has at this place.

    Args:
        p (`float`, *optional*, defaults to 0.1): probability to drop a unit, in [0, 1); as the paper's base model.
        branch (`str`, *optional*, defaults to `"all"`): `"attention"`, `"ffn"` or `"all"`.
        layers, submodel, schedule: see [`Patch`].
    """

    name: ClassVar[str] = "residual_dropout"
    formula: ClassVar[str] = "x <- x + m f(x) / (1 - p), m_j ~ Bernoulli(1 - p), f attention or FFN"
    seam: ClassVar[str] = "residual"
    acts_on: ClassVar[str] = "a branch of the chosen kind"
    rate_field: ClassVar[str] = "p"
    drops: ClassVar[str] = "hidden"
    BRANCHES: ClassVar[tuple[str, ...]] = ("all", "attention", "ffn")

    p: float = 0.1
    branch: str = "all"

    def __post_init__(self) -> None:
        check_range("residual_dropout", "p", self.p, 0, 1)
        check_choice("residual_dropout", "branch", self.branch, self.BRANCHES)
        super().__post_init__()

    def accepts(self, site: BranchSite) -> bool:
        return self.branch in ("all", site.kind)

    def gate(self, site: BranchSite) -> ResidualDropoutGate:
        return ResidualDropoutGate(self)


class ResidualDropoutGate(RateGate):
    """Drops units of what one branch adds."""

    def transform(self, states: torch.Tensor) -> torch.Tensor:
        return self.drop(states)
