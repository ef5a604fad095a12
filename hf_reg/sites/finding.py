"""The seams by name: what patches can act on, how it is found in a model, and what of it is out of reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attention import find_attention, find_uncovered
from .ffn import find_ffn, find_ffn_uncovered
from .layers import Site
from .rank import find_ranks
from .residual import find_branches
from .weights import find_weights, find_weights_uncovered


__all__ = ["SEAMS", "Kind", "find_sites"]


@dataclass(frozen=True)
class Kind:
    """One kind of place.

    Args:
        noun, nouns (`str`): what one, and several, are called in messages.
        find: the places of a model.
        uncovered: what of this kind is out of reach, by class, given the places.
        lacking (`str`): said of a model that has nothing of it.
    """

    noun: str
    nouns: str
    find: Callable[[nn.Module], Sequence[Site]]
    uncovered: Callable[[nn.Module, Any], dict[str, int]]
    lacking: str


def _uncovered_branches(model: nn.Module, sites: Any) -> dict[str, int]:
    return find_uncovered(model, [*find_attention(model), *sites])


def _find_dropouts(model: nn.Module) -> Sequence[Site]:
    from ..dropout.finding import find_dropouts  # that package has `set_dropout`, which needs this module

    return find_dropouts(model)


SEAMS = {
    "attention": Kind(
        "attention module", "attention modules", find_attention, find_uncovered, "its token mixing has code of its own"
    ),
    "ffn": Kind("FFN", "FFNs", find_ffn, find_ffn_uncovered, "its FFNs have code of their own"),
    "residual": Kind(
        "residual branch", "residual branches", find_branches, _uncovered_branches, "its layers have code of their own"
    ),
    "rank": Kind(
        "low-rank layer", "low-rank layers (LoRA adapters and others)", find_ranks, lambda model, sites: {}, ""
    ),
    "dropout": Kind("dropout", "dropouts", _find_dropouts, _uncovered_branches, "its layers have code of their own"),
    "weights": Kind(
        "linear layer", "linear layers", find_weights, find_weights_uncovered, "its weights are not in plain layers"
    ),
}


def find_sites(model: nn.Module, seam: str) -> list[Any]:
    """The places of `model` where a patch at this seam can act."""
    return list(SEAMS[seam].find(model))
