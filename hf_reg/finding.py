"""The seams by name: what patches can act on, how it is found in a model, and what of it is out of reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .ffn_sites import find_ffn, find_ffn_uncovered
from .layers import Site
from .residual_sites import find_branches
from .sites import find_attention, find_uncovered
from .weight_sites import find_weights, find_weights_uncovered


__all__ = ["SEAMS", "Kind", "find_sites"]


@dataclass(frozen=True)
class Kind:
    """One kind of place.

    Args:
        noun (`str`): what it is called in messages.
        find: the places of a model.
        uncovered: what of this kind is out of reach, by class, given the places.
        lacking (`str`): said of a model that has nothing of it.
    """

    noun: str
    find: Callable[[nn.Module], Sequence[Site]]
    uncovered: Callable[[nn.Module, Any], dict[str, int]]
    lacking: str


def _uncovered_branches(model: nn.Module, sites: Any) -> dict[str, int]:
    return find_uncovered(model, find_attention(model))


SEAMS = {
    "attention": Kind("attention module", find_attention, find_uncovered, "its token mixing has code of its own"),
    "ffn": Kind("FFN", find_ffn, find_ffn_uncovered, "its FFNs have code of their own"),
    "residual": Kind("residual branch", find_branches, _uncovered_branches, "its layers have code of their own"),
    "weights": Kind("linear layer", find_weights, find_weights_uncovered, "its weights are not in plain layers"),
}


def find_sites(model: nn.Module, seam: str) -> list[Any]:
    """The places of `model` where a patch at this seam can act."""
    return list(SEAMS[seam].find(model))
