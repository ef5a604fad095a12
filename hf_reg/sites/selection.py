"""Which modules a patch takes: `submodel=` and `layers=`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..base import Patch
from .layers import Site


__all__ = ["select"]

SLICE = re.compile(r"^\s*(-?\d*)\s*:\s*(-?\d*)\s*(?::\s*(-?\d*)\s*)?$")


def _integer(text: str | None) -> int | None:
    return int(text) if text else None


def _indices(layers: str | int | Sequence[int], total: int) -> set[int] | None:
    """The layers of `total` that are asked for; indices out of range are left out. None: not a layer selection at
    all."""
    if layers == "all":
        return set(range(total))
    if isinstance(layers, str):
        match = SLICE.match(layers)
        if match:
            step = _integer(match[3])
            return None if step == 0 else set(range(total)[slice(_integer(match[1]), _integer(match[2]), step)])
        layers = int(layers) if re.fullmatch(r"\s*-?\d+\s*", layers) else layers
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = (layers,)
    if isinstance(layers, (str, bool)) or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        return None
    return {i + total if i < 0 else i for i in layers if -total <= i < total}


def _roles(model: nn.Module, sites: Sequence[Site]) -> dict[str, set[str]]:
    """The names by which each sub-model can be called: its path, its last component, and its role in the
    configuration."""
    config = getattr(model, "config", None)
    names: dict[str, set[str]] = {}
    for site in sites:
        if site.submodel in names:
            continue
        module = model.get_submodule(site.submodel)
        called = {site.submodel, site.submodel.rsplit(".", 1)[-1]} - {""} or {"model"}
        for role in ("text", "vision", "audio", "encoder", "decoder"):
            part = getattr(config, f"{role}_config", None)
            if part is not None and type(part) is type(getattr(module, "config", None)) and part is not config:
                called.add(role)
        for role in ("encoder", "decoder"):
            if re.search(rf"(^|[._]){role}($|[._])", site.submodel):
                called.add(role)
        names[site.submodel] = called
    return names


def select(model: nn.Module, patch: Patch, sites: list[Site], noun: str = "attention module") -> list[Site]:
    """The sites that `patch` asks for.

    Raises:
        `ValueError`: naming what there is, if a sub-model or a layer does not exist or nothing is left.
    """
    names = _roles(model, sites)
    if patch.submodel != "all":
        wanted = {patch.submodel} if isinstance(patch.submodel, str) else set(patch.submodel)
        known = set().union(*names.values())
        if wanted - known:
            raise ValueError(
                f"{patch.name}: no sub-model {sorted(wanted - known)} to patch; this model has {sorted(known)} "
                f"(or 'all')."
            )
        sites = [site for site in sites if names[site.submodel] & wanted]
    depths = {site.submodel: site.layers for site in sites}
    shown = ", ".join(f"{name or 'model'}: {total}" for name, total in depths.items())
    chosen: dict[str, set[int]] = {}
    for name, total in depths.items():
        indices = _indices(patch.layers, total)
        if indices is None:
            raise ValueError(
                f"{patch.name}: layers={patch.layers!r} is no layer selection; give 'all', a slice such as "
                f"'6:', '::2' or "
                f"'-4:', an index, or a list of indices. Layers of this model: {shown}."
            )
        chosen[name] = indices
    if not isinstance(patch.layers, str):
        asked = {patch.layers} if isinstance(patch.layers, int) else set(patch.layers)
        beyond = sorted(i for i in asked if not any(-total <= i < total for total in depths.values()))
        if beyond:
            raise ValueError(f"{patch.name}: layers {beyond} do not exist. Layers of this model: {shown}.")
    selected = [site for site in sites if site.layer in chosen[site.submodel]]
    if not selected:
        raise ValueError(f"{patch.name}: layers={patch.layers!r} selects no {noun}. Layers of this model: {shown}.")
    return selected
