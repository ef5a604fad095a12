"""DropHead: drop whole attention heads at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_reg.base import Patch, RateGate, check_choice, check_range
from hf_reg.draws.heads import RESCALE, drop_heads, head_scales, keep_heads
from hf_reg.seams.skipping import attend_kept, connect_projections
from hf_reg.sites.attention import AttentionSite


__all__ = ["DropHead", "drop_heads", "keep_heads"]


@dataclass(frozen=True)
class DropHead(Patch):
    """DropHead: drops whole attention heads at random, in self- and cross-attention.

    From *Scheduled DropHead: A Regularization Method for Transformer Models* (Findings of EMNLP 2020, arXiv
    2004.13342). In training, each head of each layer is dropped with probability `p` and the others are scaled up; at
    least one head stays. It acts on the output of the heads, so it works with every attention backend. Evaluation is
    untouched.

    Args:
        p (`float`, *optional*, defaults to 0.2):
            Probability to drop a head, in [0, 1). Our choice within the range usually tried (0.1 to 0.3); the
            published values per task could not be verified.
        granularity (`str`, *optional*, defaults to `"example"`): one draw an `"example"`, or one a `"batch"`.
        rescale (`str`, *optional*, defaults to `"kept"`): `"kept"` or `"expectation"`, see [`drop_heads`].
        skip (`bool`, *optional*, defaults to `False`):
            Do not compute the dropped heads (needs `granularity="batch"`): attention of the kept heads only and, where
            the projections are plain linear layers, only their slices; faster than the unpatched model. Under
            grouped-query attention a key/value group is dropped as a whole. Every parameter keeps a gradient. Inside
            `torch.compile` and with a key/value cache, the heads are multiplied by zero or sliced after the
            projections instead, with the same result.
        attention (`str`, *optional*, defaults to `"all"`): `"self"`, `"cross"` or `"all"`.
        layers, submodel: see [`Patch`].
        schedule: see [`Patch`]; `"v_shape"` is the schedule of the paper.
    """

    name: ClassVar[str] = "drophead"
    formula: ClassVar[str] = "head_h <- xi_h c head_h, xi_h ~ Bernoulli(1 - p), c = H / (heads kept)"
    acts_on: ClassVar[str] = "attention of the chosen kind with several heads"
    rate_field: ClassVar[str] = "p"
    GRANULARITY: ClassVar[tuple[str, ...]] = ("example", "batch")
    ATTENTION: ClassVar[tuple[str, ...]] = ("all", "self", "cross")

    p: float = 0.2
    granularity: str = "example"
    rescale: str = "kept"
    skip: bool = False
    attention: str = "all"

    def __post_init__(self) -> None:
        check_range("drophead", "p", self.p, 0, 1)
        check_choice("drophead", "granularity", self.granularity, self.GRANULARITY)
        check_choice("drophead", "rescale", self.rescale, RESCALE)
        check_choice("drophead", "attention", self.attention, self.ATTENTION)
        if self.skip and self.granularity != "batch":
            raise ValueError("drophead: skip=True leaves heads out for the whole batch; it needs granularity='batch'.")
        super().__post_init__()

    def accepts(self, site: AttentionSite) -> bool:
        if site.heads == 1:  # at least one head stays
            return False
        return self.attention == "all" or site.cross == (self.attention == "cross")

    def check(self, model: nn.Module, site: AttentionSite) -> None:
        if not self.skip:
            return
        if site.kind != "interface":
            raise ValueError(
                f"drophead: skip=True cannot reach {site.path}, which has attention code of its own; use skip=False."
            )
        if site.groups == 1:
            raise ValueError(
                f"drophead: {site.path} has a single key/value group, so nothing can be skipped; use skip=False."
            )

    def gate(self, site: AttentionSite) -> DropHeadGate:
        return DropHeadGate(self, site)


class DropHeadGate(RateGate):
    """Draws the heads of one module, and scales their outputs or leaves them out."""

    patch: DropHead

    def __init__(self, patch: DropHead, site: AttentionSite) -> None:
        super().__init__(patch)
        self.heads, self.groups = site.heads, site.groups or 1
        self.kept: torch.Tensor | None = None  # the groups of this pass, where its projections are sliced
        self.slicing, self.forced = False, False
        self.sliceable: bool | None = None  # None until the first training step has tried

    def enabled(self) -> bool:
        return self.forced or super().enabled()

    def scales(self, batch: int, heads: int, device: torch.device) -> torch.Tensor | None:
        if not self.patch.skip:
            rows = batch if self.patch.granularity == "example" else 1
            return head_scales(keep_heads(rows, heads, self.rate, device), self.patch.rescale, self.rate)
        if not torch.compiler.is_compiling():
            return None  # done by `wrap`
        keep = keep_heads(1, self.groups, self.rate, device).repeat_interleave(heads // self.groups, dim=1)
        return head_scales(keep, self.patch.rescale, self.rate)

    def draw_groups(self) -> torch.Tensor:
        """The key/value groups to compute. Drawn on the host, which has to know them before it launches anything."""
        return keep_heads(1, self.groups, self.p * self.factor)[0].nonzero()[:, 0]

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return attend_kept(self, function) if self.patch.skip and not torch.compiler.is_compiling() else function

    def attach(self, model: nn.Module, site: AttentionSite) -> None:
        if self.patch.skip and not connect_projections(model, site.path, self):
            self.sliceable = False

    def notes(self) -> str:
        if not self.patch.skip:
            return ""
        how = {
            None: "slices projections if the first step agrees",
            True: "projections sliced",
            False: "skips attention only",
        }
        return how[self.sliceable]
