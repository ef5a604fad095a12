"""Standout: dropout whose probability follows the pre-activation of each unit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from hf_reg.base import Patch, RateGate, check_choice, check_range
from hf_reg.draws.units import drop_by, stay
from hf_reg.seams.own_attention import SeamHook
from hf_reg.seams.projection import follow
from hf_reg.sites.ffn import FfnSite
from hf_reg.sites.layers import parent_of


__all__ = ["Standout", "keep_probability"]


def keep_probability(z: torch.Tensor, p: float | torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """1 - p (1 - sigmoid(alpha z + beta)): the probability to keep each unit.

    Args:
        z (`torch.Tensor`): pre-activations, of any shape; no gradient goes back to them.
        p (`float` or scalar `torch.Tensor`): strength; 1 is the paper's probability, 0 keeps everything.
        alpha, beta (`float`): of the affine map.
    """
    moved = z.detach() if (alpha, beta) == (1, 0) else torch.add(z.detach() * alpha, beta)
    return torch.sigmoid(moved).mul_(p).add_(1 - p)  # in one new tensor


@dataclass(frozen=True)
class Standout(Patch):
    """Standout: drops the units of every FFN, the less likely the higher their pre-activation.

    From *Adaptive dropout for training deep neural networks* (Ba and Frey, NeurIPS 2013): a belief network over the
    hidden units draws what stays, m_j ~ Bernoulli(sigmoid(pi_j a)), h_j = m_j g(w_j a). The authors find that what it
    learns resembles the weights themselves, so it may share them: the keep probability is sigmoid(alpha z_j + beta)
    with z_j = w_j a, the unit's own pre-activation. That form is implemented here; a learned belief network would need
    parameters in the checkpoint. We know the formulas at second hand. A replication maps weights instead of
    pre-activations, alpha w + beta: the same at beta = 0.

    `p` is a strength of our own, pi_j = 1 - p (1 - sigmoid(alpha z_j + beta)): 0 is the identity, 1 the paper's. No
    gradient goes through the mask nor its probability. Units that stay are divided by pi_j, so that the mean over
    draws is the undropped activation and evaluation is the stock forward; since pi_j >= 1 - p, nothing is scaled by
    more than 1 / (1 - p). `expectation="test"` is the paper's: no scaling in training, and *evaluation* multiplies by
    pi_j, so that what is saved has to be evaluated with this patch on.

    In a gated FFN z is the pre-activation of the gate; where gate and value come from one projection, the first half.

    Args:
        p (`float`, *optional*, defaults to 0.2): strength, in [0, 1); with `"test"` also 1. Our choice: a unit with
            z = 0 is dropped with probability 0.1, T5's rate.
        alpha (`float`, *optional*, defaults to 1.0): steepness, >= 0. The usual value, as beta's.
        beta (`float`, *optional*, defaults to 0.0): shift; higher keeps more.
        expectation (`str`, *optional*, defaults to `"inverted"`): `"inverted"` or `"test"`.
        layers, submodel, schedule: see [`Patch`].
    """

    name: ClassVar[str] = "standout"
    formula: ClassVar[str] = "h_j <- m_j h_j / pi_j, m_j ~ Bernoulli(pi_j), pi_j = 1 - p sigmoid(-alpha z_j - beta)"
    seam: ClassVar[str] = "ffn"
    acts_on: ClassVar[str] = "an FFN whose pre-activation can be seen"
    rate_field: ClassVar[str] = "p"
    drops: ClassVar[str] = "ffn"
    EXPECTATION: ClassVar[tuple[str, ...]] = ("inverted", "test")

    p: float = 0.2
    alpha: float = 1.0
    beta: float = 0.0
    expectation: str = "inverted"

    def __post_init__(self) -> None:
        check_choice("standout", "expectation", self.expectation, self.EXPECTATION)
        check_range("standout", "p", self.p, 0, 1, closed=self.expectation == "test")
        check_range("standout", "alpha", self.alpha, 0, float("inf"))
        check_range("standout", "beta", self.beta, -float("inf"), float("inf"))
        object.__setattr__(self, "in_eval", self.expectation == "test")
        super().__post_init__()

    def accepts(self, site: FfnSite) -> bool:
        return bool(site.ups) or site.kind == "activation"

    def gate(self, site: FfnSite) -> StandoutGate:
        return StandoutGate(self, site.dim)


class _Remember(SeamHook):
    """Forward hook of the up-projection, or of the activation function of fused experts."""

    def __init__(self, gate: StandoutGate, point: str) -> None:
        self.owner, self.point = gate, point

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.owner.enabled():
            self.owner.seen = output if self.point == "output" else args[0]


class StandoutGate(RateGate):
    """Drops units of one FFN by their pre-activations."""

    patch: Standout

    def __init__(self, patch: Standout, dim: int) -> None:
        super().__init__(patch)
        self.dim = dim
        self.seen: torch.Tensor | None = None  # the pre-activations of the forward that is running

    def attach(self, model: nn.Module, site: FfnSite) -> None:
        if site.kind == "activation":
            site.module.register_forward_hook(_Remember(self, "input"), prepend=True)  # before the seam's
            return
        path = next((up for up in site.ups if "gate" in up.rpartition(".")[2]), site.ups[0])
        follow(*parent_of(model, path), _Remember(self, "output"))

    def enabled(self) -> bool:
        return self.active and (self.training or self.patch.in_eval)

    def transform(self, states: torch.Tensor) -> torch.Tensor:
        z, self.seen = self.seen, None
        width = states.shape[self.dim]
        if z is not None and z.shape[self.dim] == 2 * width:
            z = z.narrow(self.dim, 0, width)
        if z is None or z.shape != states.shape:
            raise RuntimeError(
                f"standout found pre-activations {None if z is None else tuple(z.shape)} for activations "
                f"{tuple(states.shape)}; leave such FFNs out (`layers=`, `submodel=`), or report the model."
            )
        rate = self.rate if torch.compiler.is_compiling() else self.p * self.factor
        keep_of = partial(keep_probability, p=rate, alpha=self.patch.alpha, beta=self.patch.beta)
        if not self.patch.in_eval:
            return drop_by(states, z, keep_of)
        return states * (stay(keep_of(z)) if self.training else keep_of(z))

    def notes(self) -> str:
        return "evaluation multiplies by the keep probability" if self.patch.in_eval else ""
