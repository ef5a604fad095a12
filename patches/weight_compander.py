"""Weight compander: every weight is the arctangent of what is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_reg.base import check_range
from hf_reg.seams.reparameterized import Reparameterized, Start
from hf_reg.seams.weights import WeightGate, WeightPatch
from hf_reg.sites.weights import WeightSite


__all__ = ["CompandedLayer", "WeightCompander", "compand"]


def compand(v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a arctan(v / b): monotone, of slope a / b at 0, bounded by a pi / 2."""
    return a * torch.atan(v / b)


class _Compand(torch.autograd.Function):
    """[`compand`] plus an offset, with fixed a and b: keeps v alone for the backward pass, and makes fewer copies."""

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(v, a, b)
        return (v / b).atan_().mul_(a).add_(offset)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        v, a, b = ctx.saved_tensors
        x = v / b
        return torch.addcmul(torch.ones_like(a), x, x).reciprocal_().mul_(gradients[0]).mul_(a / b), None, None, None


class CompandedLayer(Reparameterized):
    """A linear layer whose weight is computed from `weight_v`; its forward is the stock one."""

    weight_v: nn.Parameter
    weight_a: torch.Tensor
    weight_b: torch.Tensor
    weight_offset: torch.Tensor

    def dense(self) -> torch.Tensor:
        a, b, v = self.weight_a, self.weight_b, self.weight_v
        scales = self._parameters.get("weight_scales")
        if scales is None:
            return _Compand.apply(v.to(a.dtype), a, b, self.weight_offset).to(v.dtype)
        a, b = a * scales[0].exp(), b * scales[1].exp()
        return (compand(v.to(a.dtype), a, b) + self.weight_offset).to(v.dtype)


@dataclass(frozen=True)
class WeightCompander(WeightPatch):
    """Weight compander: trains v in place of every weight w = a arctan(v / b), which bounds the weights and pushes
    small ones apart.

    From *Weight Compander: A Simple Weight Reparameterization for Regularization* (arXiv 2306.16993). The weights of
    the linear layers of attention and FFN are reparameterized; biases, norms, embeddings and heads stay. We could
    confirm that a function restricts each weight's magnitude and that its parameters can be learned, but not the
    paper's own initialisation and values; those here are ours.

    Of each layer a pi / 2 = headroom * max |w| and b = a / slope, so that v = b tan(w / a) always exists and nothing
    is clamped (an all-zero layer takes a = 1). With slope 1 a small v is its weight, and learning rates keep their
    meaning; the gradient is (a / b) / (1 + (v / b)^2) of that of w. The rounding of arctan(tan) is kept as a constant
    beside v, so that the model computes bit for bit what it did until v is trained.

    `v` is a parameter `weight_v`; weight decay and penalties on parameters act on v, not on w. Make the optimizer
    after patching (`RegularizedTrainer` does). `state_dict()`, `save_pretrained` and `unpatch_model` give stock
    layers with the *trained* weights; a loaded weight chooses a and b anew, and a resumed trainer gets v, a and b back
    exactly. FSDP and ZeRO-3 are refused, adapters on a patched layer too. Every forward computes the arctangent
    anew, 1.04 of MiniLM's step at 2048 tokens on a CPU thread and 1.01 at 4096: unpatch a model before serving it.
    Memory: half a weight for the constant, a whole one for the backward pass.

    Args:
        headroom (`float`, *optional*, defaults to 2.0): the bound on a layer's weights, in units of its largest one at
            the start; above 1. Our choice: at the largest weight the slope is then half of that at 0.
        slope (`float`, *optional*, defaults to 1.0): a / b, the slope at 0; positive. Our choice.
        learned (`bool`, *optional*, defaults to `False`): whether a and b are trained, each as its start times
            exp(s): two numbers a layer, `weight_scales`, which no checkpoint holds.
        branch (`str`, *optional*, defaults to `"all"`): `"attention"`, `"ffn"` or `"all"`.
        layers, submodel: see [`Patch`].
    """

    name: ClassVar[str] = "weight_compander"
    formula: ClassVar[str] = "w = a arctan(v / b), v trained, v = b tan(w / a) at the start"
    layer_kind: ClassVar[type[Reparameterized]] = CompandedLayer

    headroom: float = 2.0
    slope: float = 1.0
    learned: bool = False

    def __post_init__(self) -> None:
        check_range(self.name, "headroom", self.headroom, 1, math.inf)
        check_range(self.name, "slope", self.slope, 0, math.inf)
        if self.headroom == 1 or self.slope == 0:
            raise ValueError(f"{self.name}: headroom={self.headroom} must be above 1, slope={self.slope} above 0.")
        if not isinstance(self.learned, bool):
            raise TypeError(f"{self.name}: learned must be True or False, got {self.learned!r}.")
        super().__post_init__()

    def initial(self, layer: nn.Module, weight: torch.Tensor) -> Start:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        largest = wide.abs().max()
        if not wide.is_meta and not torch.isfinite(largest):
            raise ValueError(f"{self.name}: a weight of shape {tuple(weight.shape)} has entries that are not finite.")
        bound = torch.where(largest > 0, largest, torch.ones_like(largest)) * self.headroom
        a = bound * 2 / math.pi
        b = a / self.slope
        v = (b * torch.tan(wide / a)).to(weight.dtype)
        found = compand(v.to(wide.dtype), a, b)
        offset = (wide - found).to(torch.bfloat16)  # a few units in the last place: it holds them in half the memory
        if not wide.is_meta and not torch.equal((found + offset).to(weight.dtype), weight):
            offset = wide - found
        start = {"weight_v": nn.Parameter(v), "weight_offset": offset, "weight_a": a, "weight_b": b}
        return start | ({"weight_scales": nn.Parameter(torch.zeros_like(a).repeat(2))} if self.learned else {})

    def gate(self, site: WeightSite) -> CompanderGate:
        return CompanderGate(self, site)


class CompanderGate(WeightGate):
    """The gate of one layer."""

    def notes(self) -> str:
        layer = self.held[0]
        if not isinstance(layer, CompandedLayer) or layer.weight_a.is_meta:
            return ""
        return f"{self.path} |w| < {layer.weight_a.item() * math.pi / 2:.3g}"
