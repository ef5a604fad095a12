"""The dropouts of a model as places where a patch can act: its own, those of `set_dropout`, those of patches."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..base import RateGate
from ..seams.dropout import PlaceGate
from ..sites.layers import DropoutSite, layer_key, layer_lists, locate
from ..sites.residual import BranchSite, find_branches
from .added import GATES
from .places import Map, under


__all__ = ["find_dropouts"]


Found = tuple[str, nn.Module, str, str, nn.Module, str]  # path, module, kind, how, owner, attribute


def _own_places(model: nn.Module, found: Map) -> Iterator[Found]:
    """Those that the model's classes have."""
    interface = {site.path: site.module for site in found.sites if site.kind == "interface"}
    for place in found.places:
        if place.kind == "attention" and place.holder in interface:
            yield place.path, interface.pop(place.holder), place.kind, "interface", place.owner, place.attribute
        else:
            yield place.path, place.owner, place.kind, place.how, place.owner, place.attribute


def _added_places(model: nn.Module) -> Iterator[Found]:
    """Those of `set_dropout` and of patches."""
    for path, module in model.named_modules():
        if isinstance(module, RateGate) and not isinstance(module, PlaceGate) and module.patch.drops:
            yield path, module, module.patch.drops, "gate", module, "p"
        for kind, name in GATES.items():
            if name in module._modules:
                added = module.get_submodule(name)
                yield f"{path}.{name}", added, kind, "module", added, "p"


def find_dropouts(model: nn.Module) -> list[DropoutSite | BranchSite]:
    """The dropouts of `model`, and the residual branches of layers whose class has none (Llama), which
    `hidden_dropout` gives one."""
    known = Map(model)
    found = [*_own_places(model, known), *_added_places(model)]
    held = [gate.dial for gate in model.modules() if isinstance(gate, PlaceGate) and gate.dial is not None]
    own = {(dial.owner, dial.attribute): dial.own for dial in held}
    attention = {site.module: site for site in known.sites}
    lists = layer_lists(model)
    inside = [path for path, *_ in found if layer_key(path, lists)]
    located = dict(zip(inside, locate(model, inside, lists), strict=True))
    depths = {submodel: layers for submodel, _, _, layers in located.values()}
    outside = [path for path, *_ in found if path not in located]
    for path, (submodel, name, _, _) in zip(outside, locate(model, outside, lists), strict=True):
        located[path] = submodel, name, 0, depths.get(submodel, 1)
    places = [
        DropoutSite(
            module, path, *located[path], kind, how, owner, attribute,
            float(own.get((owner, attribute), getattr(owner, attribute))),
            attention[module] if how == "interface" else None,
        )
        for path, module, kind, how, owner, attribute in found
    ]  # fmt: skip
    bare = known.missing("hidden")
    return [*places, *(one for one in find_branches(model) if any(under(one.path, path) for path in bare))]
