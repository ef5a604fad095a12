"""Hidden dropout: the model's own dropout of residual branches and embeddings, at a rate of your own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_reg.base import Patch, RateGate, check_range
from hf_reg.patches.residual_dropout import ResidualDropoutGate
from hf_reg.seams.dropout import PlaceGate
from hf_reg.sites.layers import DropoutSite
from hf_reg.sites.residual import BranchSite


__all__ = ["HiddenDropout"]


@dataclass(frozen=True)
class HiddenDropout(Patch):
    """Hidden dropout: the model's own dropout of residual branches and embeddings at rate `p`, as a plain baseline;
    on the residual branches where its class has none (Llama, Mistral, Qwen, Gemma).

    From *Attention Is All You Need* (NeurIPS 2017, arXiv 1706.03762, section 5.4). Units are dropped one by one and
    the others scaled by 1 / (1 - p). It *replaces* the rate that the model has, through the model's own code; that and
    the configuration are as before after `unpatch_model`. `set_dropout(model, hidden=p)` does the same for good,
    configuration included; `residual_dropout` comes in addition to what is there.

    Args:
        p (`float`, *optional*, defaults to 0.1): probability to drop a unit, in [0, 1); as the paper's base model.
        layers, submodel, schedule: see [`Patch`].
    """

    name: ClassVar[str] = "hidden_dropout"
    formula: ClassVar[str] = "x <- x + m f(x) / (1 - p), m_j ~ Bernoulli(1 - p), f attention or FFN; embeddings too"
    seam: ClassVar[str] = "dropout"
    acts_on: ClassVar[str] = "of residual branches"
    rate_field: ClassVar[str] = "p"
    drops: ClassVar[str] = "hidden"

    p: float = 0.1

    def __post_init__(self) -> None:
        check_range("hidden_dropout", "p", self.p, 0, 1)
        super().__post_init__()

    def accepts(self, site: Any) -> bool:
        own = isinstance(site, DropoutSite) and site.kind == "hidden" and site.how != "gate"
        return own or isinstance(site, BranchSite)

    def gate(self, site: DropoutSite | BranchSite) -> RateGate:
        return PlaceGate(self, site.how) if isinstance(site, DropoutSite) else ResidualDropoutGate(self)
