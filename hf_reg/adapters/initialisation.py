"""The first factors of an adapter: those of the principal singular triplets of every weight it adapts."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .config import SvdAdapterConfig
from .linear import SvdLinear, base_weight, is_quantised
from .storage import layers_of
from .svd import decompose_layers


__all__ = ["initialise"]


def initialise(model: nn.Module, adapter_name: str, config: SvdAdapterConfig) -> None:
    """Decompose the weights, and only then start the adapter in every layer.

    Raises:
        `ValueError`: for weights that cannot be decomposed, or written into where `config.folded` asks for it.
    """
    layers = dict(layers_of(model, adapter_name))
    if config.folded:
        _check_foldable(model, layers, type(config).__name__)
    factors = decompose_layers(
        {path: partial(base_weight, layer.get_base_layer()) for path, layer in layers.items()},
        {path: layer.r[adapter_name] for path, layer in layers.items()},
        tolerance=config.svd_tolerance, seed=config.svd_seed, cache_dir=config.svd_cache_dir, progress=None,
    )  # fmt: skip
    for path, layer in layers.items():
        layer.begin(adapter_name, factors.pop(path), config.folded)


def _check_foldable(model: nn.Module, layers: dict[str, SvdLinear], name: str) -> None:
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    for path, layer in layers.items():
        weight: Any = layer.get_base_layer().weight
        if is_quantised(layer.get_base_layer()):
            raise ValueError(
                f"{name}: folded=True would write into {path}, whose weight is quantised ({weight.dtype}). Use "
                "folded=False, which leaves the base weights alone."
            )
        if len(owners.get(id(weight), [])) > 1:
            raise ValueError(
                f"{name}: folded=True would write into a weight that {' and '.join(owners[id(weight)])} share. Use "
                "folded=False, or leave it out of target_modules."
            )
