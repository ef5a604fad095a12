"""Adaptive dropout: features before and after channel dropout are mixed; layers are annealed one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_reg.base import Patch, RateGate, check_choice, check_range
from hf_reg.schedules import Schedule, constant
from hf_reg.sites.ffn import FfnSite


__all__ = ["AdaptiveDropout", "annealed"]


@dataclass(frozen=True)
class annealed(Schedule):
    """`inner` until layer `layer` of `layers` is switched off, at `until * (layer + 1) / layers` of training."""

    inner: Schedule
    layer: int
    layers: int
    until: float

    def factor(self, progress: float, losses: Sequence[float]) -> float:
        off = self.until and progress >= self.until * (self.layer + 1) / self.layers
        return 0.0 if off else self.inner.factor(progress, losses)


@dataclass(frozen=True)
class AdaptiveDropout(Patch):
    """Adaptive dropout: channels of every FFN are dropped for a whole example, the result is mixed with the undropped
    features, and layers are switched to the plain forward one after another, the first layer first.

    From *Adaptive Dropout: Unleashing Dropout across Layers for Generalizable Image Super-Resolution* (CVPR 2025,
    arXiv 2506.12738). Abstract and released code were read, the equations of the paper were not. In the code a place
    between the two convolutions of each residual block computes w x + (1 - w) D(x), D channel dropout at 0.5, w = 0.3;
    every 20,000 of 500,000 steps one more of the 17 places gets w = 1, the shallowest first, so all are off at 0.68 of
    training. A small network that predicts w is commented out there. Nothing is known about language models.

    Here the place is the activation between the projections of an FFN. The paper's is before the ReLU; for ReLU the
    two are equal, since every factor is positive or 0. Channels are drawn for each example; inside of experts and
    wherever examples are flattened, for all tokens of the call. Evaluation is the stock forward (the code's w = 1).

    The factor on a dropped channel is w, on a kept one w + (1 - w) / (1 - p), so the mean over draws is x. A token
    with mean mu and variance s^2 over its channels gets on average the variance s^2 + (1 - w)^2 p / (1 - p) (mu^2 +
    s^2). `mix="variance"`, ours and not the paper's, chooses 1 - w = (1 - weight) s / sqrt(mu^2 + s^2) for each token:
    then the variance grows by the same share, (1 - weight)^2 p / (1 - p), in all of them. It has no parameters, so
    checkpoints stay stock, and looks at no other token. No gradient goes through w.

    Args:
        p (`float`, *optional*, defaults to 0.5): probability to drop a channel, in [0, 1). The released code's.
        weight (`float`, *optional*, defaults to 0.3): w, of the undropped features, in [0, 1). The released code's.
        mix (`str`, *optional*, defaults to `"constant"`): `"constant"` (released code) or `"variance"`.
        anneal (`float`, *optional*, defaults to 0.68): fraction of training after which the last layer is off; 0 keeps
            all on. The released code's (17 x 20,000 of 500,000 steps). `ScheduleCallback` or `model_step` drives it.
        layers, submodel, schedule: see [`Patch`].
    """

    name: ClassVar[str] = "adaptive_dropout"
    formula: ClassVar[str] = (
        "h <- w h + (1 - w) m h / (1 - p), m_c ~ Bernoulli(1 - p) by channel; w = 1 layer by layer"
    )
    seam: ClassVar[str] = "ffn"
    acts_on: ClassVar[str] = "an FFN"
    rate_field: ClassVar[str] = "p"
    drops: ClassVar[str] = "ffn"
    MIX: ClassVar[tuple[str, ...]] = ("constant", "variance")

    p: float = 0.5
    weight: float = 0.3
    mix: str = "constant"
    anneal: float = 0.68

    def __post_init__(self) -> None:
        check_range("adaptive_dropout", "p", self.p, 0, 1)
        check_range("adaptive_dropout", "weight", self.weight, 0, 1)
        check_choice("adaptive_dropout", "mix", self.mix, self.MIX)
        check_range("adaptive_dropout", "anneal", self.anneal, 0, 1, closed=True)
        super().__post_init__()

    def gate(self, site: FfnSite) -> AdaptiveGate:
        return AdaptiveGate(self, site)


class AdaptiveGate(RateGate):
    """Drops channels of one FFN, and mixes."""

    patch: AdaptiveDropout

    def __init__(self, patch: AdaptiveDropout, site: FfnSite) -> None:
        super().__init__(patch)
        self.dim = site.dim
        inner = patch.schedule if isinstance(patch.schedule, Schedule) else constant()
        self.schedule = annealed(inner, site.layer, site.layers, patch.anneal)

    def transform(self, states: torch.Tensor) -> torch.Tensor:
        shape = [1] * states.dim()
        shape[self.dim] = states.shape[self.dim]
        if states.dim() > 2:
            shape[0] = states.shape[0]
        rate = self.rate if torch.compiler.is_compiling() else min(self.p * self.factor, 1.0)
        noise = torch.rand(shape, device=states.device)
        moved = (noise >= rate) / (1 - rate) - 1  # D(x) - x, in units of x
        share = 1 - self.patch.weight
        if self.patch.mix == "variance":
            with torch.no_grad():
                variance, mean = torch.var_mean(states.float(), dim=self.dim, keepdim=True, correction=0)
                moved = moved * (variance / (variance + mean.square()).clamp(min=1e-12)).sqrt()
        return states * (1 + share * moved).to(states.dtype)
