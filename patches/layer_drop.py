"""Stochastic depth: drop whole residual branches, or whole layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hf_reg.base import Patch, RateGate, check_choice, check_range
from hf_reg.seams.layer_pass import LayerPass, check_batch_first, holds_attention, layer_of, share_pass
from hf_reg.sites.residual import BranchSite


__all__ = ["LayerDrop"]

REMEDY = "use granularity='batch', or leave this part out with `layers=` or `submodel=`"


@dataclass(frozen=True)
class LayerDrop(Patch):
    """Stochastic depth: drops whole residual branches at random, each example its own, the deeper the more often.

    From *Deep Networks with Stochastic Depth* (ECCV 2016, arXiv 1603.09382); the variant for Transformers is that of
    *Reducing Transformer Depth on Demand with Structured Dropout* (LayerDrop, ICLR 2020, arXiv 1909.11556):
    `unit="layer", depth="uniform", granularity="batch", rescale=False`. A dropped branch is multiplied by zero, not
    skipped: every parameter keeps a gradient on every rank, and no time is saved.

    The rate of layer l of L is p_l = p l / L, l from 1: the first paper's survival probability 1 - (1 - s_L) l / L
    with s_L = 1 - p. Its test-time network multiplies branch l by its survival probability; here what is kept is
    divided by it in training instead, which has the same mean and leaves evaluation the stock forward. LayerDrop
    rescales neither in training nor at test time.

    In post-norm models (BERT) the sum is normalised, x <- LN(x + f(x)): a dropped branch leaves LN(x), and a dropped
    layer LN(LN(x)), not the identity that it is in pre-norm models. Only branches are dropped, never these norms.

    Args:
        p (`float`, *optional*, defaults to 0.1):
            Probability to drop the last layer, in [0, 1). Our choice for fine-tuning; the published ResNets take 0.5
            and LayerDrop 0.2 (from memory, could not be verified).
        unit (`str`, *optional*, defaults to `"branch"`):
            `"branch"` (attention and FFN by themselves, as DropPath does) or `"layer"` (one draw for all branches of
            a layer, cross-attention included).
        granularity (`str`, *optional*, defaults to `"example"`): one draw an `"example"`, or one a `"batch"`.
        depth (`str`, *optional*, defaults to `"linear"`): `"linear"` (p_l = p l / L) or `"uniform"` (p_l = p).
        rescale (`bool`, *optional*, defaults to `True`): divide what is kept by 1 - p_l, so that the mean is kept.
        layers, submodel, schedule: see [`Patch`].
    """

    name: ClassVar[str] = "layer_drop"
    formula: ClassVar[str] = "x <- x + m_l f_l(x) / (1 - p_l), m_l ~ Bernoulli(1 - p_l), p_l = p l / L"
    seam: ClassVar[str] = "residual"
    acts_on: ClassVar[str] = "a residual branch"
    rate_field: ClassVar[str] = "p"

    p: float = 0.1
    unit: str = "branch"
    granularity: str = "example"
    depth: str = "linear"
    rescale: bool = True

    def __post_init__(self) -> None:
        check_range("layer_drop", "p", self.p, 0, 1)
        check_choice("layer_drop", "unit", self.unit, ("branch", "layer"))
        check_choice("layer_drop", "granularity", self.granularity, ("example", "batch"))
        check_choice("layer_drop", "depth", self.depth, ("linear", "uniform"))
        check_choice("layer_drop", "rescale", self.rescale, (True, False))
        super().__post_init__()

    def check(self, model: nn.Module, site: BranchSite) -> None:
        if self.granularity == "example":
            check_batch_first("layer_drop", site, REMEDY)
        if self.unit == "layer":
            layer = layer_of(model, site)
            if layer is None or not holds_attention(layer):
                raise ValueError(
                    f"layer_drop: {site.path} stands in no layer that holds both attention and FFN; use unit='branch'."
                )

    def gate(self, site: BranchSite) -> LayerDropGate:
        return LayerDropGate(self, site)


class LayerDropGate(RateGate):
    """Drops one branch, by itself or with the others of its layer."""

    patch: LayerDrop

    def __init__(self, patch: LayerDrop, site: BranchSite) -> None:
        super().__init__(patch)
        self.path = site.path
        self.share = (site.layer + 1) / site.layers if patch.depth == "linear" else 1.0
        self.layer_pass = LayerPass()

    def attach(self, model: nn.Module, site: BranchSite) -> None:
        self.layer_pass = share_pass(model, site, self)

    def transform(self, states: torch.Tensor) -> torch.Tensor:
        each = self.patch.granularity == "example"
        examples = self.layer_pass.by_example(states, f"layer_drop at {self.path}", REMEDY) if each else states[None]
        rows, device = examples.shape[0], states.device
        whole = self.patch.unit == "layer"
        drawn = self.layer_pass.draw(self.path, rows, device) if whole else torch.rand(rows, device=device)
        rate = self.rate * self.share
        keep = (drawn >= rate).float()
        if self.patch.rescale:
            keep = keep / (1 - rate).clamp(min=1e-12)
        return (examples * keep.to(states.dtype).view(-1, *[1] * (examples.dim() - 1))).view(states.shape)

    def notes(self) -> str:
        return "more with depth" if self.patch.depth == "linear" else ""
