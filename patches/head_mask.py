"""Head mask: switch chosen attention heads off, for ablation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from hf_reg.base import Gate, Patch, check_choice
from hf_reg.sites.attention import AttentionSite


__all__ = ["HeadMask"]


@dataclass(frozen=True)
class HeadMask(Patch):
    """Head mask: switches chosen heads off, in training *and* evaluation; the `head_mask` that transformers 5 removed.

    The output of each head named is multiplied by zero before the output projection, without rescaling, which is what
    removing the head from the projections would do (*Are Sixteen Heads Really Better than One?*, arXiv 1905.10650).

    Args:
        heads (mapping of `int` to sequence of `int`):
            Heads to switch off by layer, `{layer: [head, ...]}`; negative ones count from the end. In a model with
            several sub-models name one with `submodel=`.
        attention (`str`, *optional*, defaults to `"self"`): `"self"`, `"cross"` or `"all"`.
        submodel: see [`Patch`]. `layers` is given by `heads`.
    """

    name: ClassVar[str] = "head_mask"
    formula: ClassVar[str] = "head_h <- 0 for the chosen heads h"
    in_eval: ClassVar[bool] = True

    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    attention: str = "self"
    layers: tuple[int, ...] = field(init=False, default=(), repr=False, kw_only=True)

    def __post_init__(self) -> None:
        check_choice("head_mask", "attention", self.attention, ("all", "self", "cross"))
        if not isinstance(self.heads, Mapping) or not self.heads:
            raise ValueError(f"head_mask needs heads={{layer: [head, ...]}}, got {self.heads!r}.")
        heads = {int(layer): tuple(int(head) for head in chosen) for layer, chosen in self.heads.items()}
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "layers", tuple(heads))
        super().__post_init__()

    def accepts(self, site: AttentionSite) -> bool:
        return self.attention == "all" or site.cross == (self.attention == "cross")

    def chosen(self, site: AttentionSite) -> tuple[int, ...]:
        return (*self.heads.get(site.layer, ()), *self.heads.get(site.layer - site.layers, ()))

    def check(self, model: nn.Module, site: AttentionSite) -> None:
        beyond = [
            head for head in self.chosen(site) if site.heads is not None and not -site.heads <= head < site.heads
        ]
        if beyond:
            raise ValueError(
                f"head_mask: {site.path or 'the model'} has {site.heads} heads, but heads {beyond} are named."
            )

    def gate(self, site: AttentionSite) -> HeadMaskGate:
        return HeadMaskGate(self, self.chosen(site))


class HeadMaskGate(Gate):
    """Zeroes the chosen heads of one module."""

    def __init__(self, patch: HeadMask, heads: tuple[int, ...]) -> None:
        super().__init__(patch)
        self.heads = heads

    def scales(self, batch: int, heads: int, device: torch.device) -> torch.Tensor:
        on = [0.0 if index in self.heads or index - heads in self.heads else 1.0 for index in range(heads)]
        return torch.tensor([on], device=device)
