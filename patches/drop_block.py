"""DropBlock: drop contiguous spans of tokens, or square regions of image patches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hf_reg.base import Patch, RateGate, check_choice, check_range
from hf_reg.draws.blocks import keep_spans, keep_squares, leading_tokens, sees_images, why_no_square
from hf_reg.schedules import linear
from hf_reg.seams.layer_pass import LayerPass, check_batch_first, share_pass
from hf_reg.sites.residual import BranchSite


__all__ = ["DropBlock", "keep_spans", "keep_squares"]

REMEDY = "leave this part out with `layers=`, `submodel=` or `branch=`"


@dataclass(frozen=True)
class DropBlock(Patch):
    """DropBlock: drops contiguous regions of what attention and FFN add to the residual stream, spans of tokens in
    text and squares of patches in images.

    From *DropBlock: A regularization method for convolutional networks* (NeurIPS 2018, arXiv 1810.12890). It acts on
    the ends of residual branches: these are feature maps, (B, T, C), in every architecture, mixtures of experts
    included, and one of the places where the authors' ResNet has it (their code was read, the paper was not).

    A block begins at a token with probability gamma and covers the `block_size` tokens from there, all of them within
    the text. The expected number of dropped tokens, overlaps not counted, is gamma x (possible beginnings) x (size of
    a block), and shall be p x tokens. T tokens of text have T - b + 1 beginnings, N x N patches (N - b + 1)^2:

    - spans: gamma = p T / (b (T - b + 1)), with b = min(block_size, T),
    - squares: gamma = p N^2 / (b^2 (N - b + 1)^2), with b = min(block_size, N): the paper's equation.

    Overlaps make the dropped part smaller than p, as in the paper. What is kept is multiplied by count(M) /
    count_ones(M) over the whole batch, as the authors' code does. Padding is no token here: no block touches it and
    it is not counted. Class and register tokens before the patches are spared; `[CLS]` in text is a token as others.

    Args:
        p (`float`, *optional*, defaults to 0.1): part of the tokens to drop, in [0, 1): 1 - keep_prob, 0.9 there
            (from memory, as is 7 below: not verified).
        block_size (`int`, *optional*, defaults to 7):
            Length of a span, or side of a square. The paper's for feature maps; for text it is our choice.
        shape (`str`, *optional*, defaults to `"auto"`):
            `"span"`, `"square"` (of image models whose patches are a square grid), or `"auto"`: squares in sub-models
            that take images, spans elsewhere.
        channels (`str`, *optional*, defaults to `"shared"`):
            `"shared"`: a block covers all channels. `"own"`: each channel has blocks of its own, as in the authors'
            code; a step then costs 1.06 of an unpatched one, so it is not the default.
        branch (`str`, *optional*, defaults to `"all"`): `"attention"`, `"ffn"` or `"all"`.
        schedule:
            See [`Patch`]. `"linear"` is here the paper's: the rate grows from 0 to p over training.
        layers, submodel: see [`Patch`].
    """

    name: ClassVar[str] = "drop_block"
    formula: ClassVar[str] = "f(x) <- f(x) M count(M) / count_ones(M), M = 0 on blocks of b tokens begun at rate gamma"
    seam: ClassVar[str] = "residual"
    acts_on: ClassVar[str] = "a branch of the chosen kind"
    rate_field: ClassVar[str] = "p"

    p: float = 0.1
    block_size: int = 7
    shape: str = "auto"
    channels: str = "shared"
    branch: str = "all"

    def __post_init__(self) -> None:
        check_range("drop_block", "p", self.p, 0, 1)
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"drop_block: block_size={self.block_size!r} must be a whole number, 1 or more.")
        check_choice("drop_block", "shape", self.shape, ("auto", "span", "square"))
        check_choice("drop_block", "channels", self.channels, ("shared", "own"))
        check_choice("drop_block", "branch", self.branch, ("all", "attention", "ffn"))
        if self.schedule == "linear":
            object.__setattr__(self, "schedule", linear(start=0.0, end=1.0))
        super().__post_init__()

    def accepts(self, site: BranchSite) -> bool:
        return self.branch in ("all", site.kind)

    def _square(self, part: nn.Module) -> bool:
        return self.shape == "square" or (self.shape == "auto" and sees_images(part))

    def check(self, model: nn.Module, site: BranchSite) -> None:
        check_batch_first("drop_block", site, REMEDY)
        part = model.get_submodule(site.submodel)
        if self._square(part) and (reason := why_no_square(part)):
            raise ValueError(
                f"drop_block: {site.submodel or 'the model'} ({site.submodel_class}) has no square grid of patches: "
                f"{reason}. Use shape='span' for blocks of tokens in their order, or leave it out with `submodel=`."
            )

    def gate(self, site: BranchSite) -> DropBlockGate:
        return DropBlockGate(self, site)


class DropBlockGate(RateGate):
    """Drops blocks of what one branch adds."""

    patch: DropBlock

    def __init__(self, patch: DropBlock, site: BranchSite) -> None:
        super().__init__(patch)
        self.path = site.path
        self.leading: int | None = None  # tokens before a grid of patches; None: spans
        self.layer_pass = LayerPass()

    def attach(self, model: nn.Module, site: BranchSite) -> None:
        square = self.patch._square(model.get_submodule(site.submodel))
        self.leading = leading_tokens(model, site.submodel) if square else None
        self.layer_pass = share_pass(model, site, self)

    def transform(self, states: torch.Tensor) -> torch.Tensor:
        tokens = self.layer_pass.by_example(states, f"drop_block at {self.path}", REMEDY)
        if tokens.dim() != 3:
            raise ValueError(f"drop_block at {self.path}: {tuple(states.shape)} is no (B, T, C); {REMEDY}.")
        channels = tokens.shape[2] if self.patch.channels == "own" else 1
        if self.leading is None:
            real = self.layer_pass.real(tokens)
            coins = torch.rand(*real.shape, channels, device=states.device)
            keep = keep_spans(coins, real, self.patch.block_size, self.rate)
            factor = torch.where(real[..., None], keep * real.sum() * channels / _ones(keep & real[..., None]), 1.0)
            return (tokens * factor.to(states.dtype)).view(states.shape)
        patches = tokens.shape[1] - self.leading
        side = math.isqrt(max(patches, 0))
        if side == 0 or side * side != patches:
            raise ValueError(
                f"drop_block at {self.path}: {tokens.shape[1]} tokens, {self.leading} of them before the patches, are "
                "no square grid; use shape='span', or leave this part out with `layers=` or `submodel=`."
            )
        coins = torch.rand(tokens.shape[0], side, side, channels, device=states.device)
        keep = keep_squares(coins, self.patch.block_size, self.rate)
        factor = (keep * keep.numel() / _ones(keep)).flatten(1, 2)
        factor = nn.functional.pad(factor, (0, 0, self.leading, 0), value=1.0)
        return (tokens * factor.to(states.dtype)).view(states.shape)


def _ones(keep: torch.Tensor) -> torch.Tensor:
    return keep.sum().clamp(min=1)
