"""Where the weights of a transformer are: the linear layers of attention and FFN, found without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..seams.reparameterized import Reparameterized
from .attention import find_attention, find_uncovered
from .ffn import SIDE, find_ffn, find_ffn_uncovered, widths
from .layers import ProjectionSite, layer_lists, locate
from .residual import find_branches


__all__ = ["WeightSite", "find_weights", "find_weights_uncovered"]


@dataclass(frozen=True)
class WeightSite(ProjectionSite):
    """One linear layer. `kind` is `"attention"` or `"ffn"`."""


def _is_place(module: nn.Module) -> bool:
    """A linear layer whose forward is known; one that is wrapped or quantised counts too, and is refused by name."""
    if type(module) in (nn.Linear, Conv1D) or isinstance(module, Reparameterized) or hasattr(module, "base_layer"):
        return True
    weight = getattr(module, "weight", None) if isinstance(module, nn.Linear) else None
    return weight is not None and not weight.is_floating_point()


def _leaves(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers in a module, wrappers of PEFT as a whole."""
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if SIDE.search(name):
            continue
        if widths(child) is None:
            yield from _leaves(here, child)
        else:
            yield here, child


def _paths(model: nn.Module) -> dict[str, str]:
    """Kind by path; the layers that are not [`_is_place`] included."""
    found: dict[str, str] = {}
    for site in find_attention(model):
        found |= {path: "attention" for path, _ in _leaves(site.path, site.module)}
    for branch in find_branches(model):
        if branch.kind == "attention":
            found[branch.path] = "attention"
    for ffn in find_ffn(model):
        found |= {path: "ffn" for path in (*ffn.ups, ffn.path)}
    return found


def find_weights(model: nn.Module) -> list[WeightSite]:
    """The linear layers of attention and FFN of `model`, in the order of `named_modules`."""
    found = _paths(model)
    modules = {path: module for path, module in model.named_modules() if path in found and _is_place(module)}
    located = locate(model, list(modules), layer_lists(model))
    return [
        WeightSite(
            module, path, *where, model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], found[path],
            "weight",
        )
        for (path, module), where in zip(modules.items(), located, strict=True)
    ]  # fmt: skip


def find_weights_uncovered(model: nn.Module, sites: list[WeightSite]) -> dict[str, int]:
    """Fused experts, convolutions and linear layers with code of their own, by class name."""
    reached = {site.path for site in sites}
    uncovered = Counter(type(model.get_submodule(path)).__name__ for path in _paths(model).keys() - reached)
    ffns = find_ffn(model)
    for ffn in ffns:
        if ffn.kind == "activation":  # what holds the weights is the parent of the activation
            uncovered[type(ffn.module).__name__] -= 1
            uncovered[type(ffn.parent).__name__] += 1
    return dict(+uncovered) | find_ffn_uncovered(model, ffns) | find_uncovered(model, find_attention(model))
