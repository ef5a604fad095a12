"""Gates put into a model and taken out again, at whatever seam they act."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from itertools import chain
from typing import Any

import torch
from torch import nn

from .base import Gate
from .checkpoints.saves import install_saves
from .seams.attention import SEAM, AttentionSeam, Seam, install, seams
from .seams.dropout import DropoutSeam, PlaceGate, connect_dropout, dropout_key
from .seams.own_attention import connect, disconnect
from .seams.projection import ProjectionSeam, connect_projection, projection_key
from .seams.weights import WeightSeam, connect_weight
from .sites.attention import AttentionSite
from .sites.layers import DropoutSite, ProjectionSite, Site
from .sites.weights import WeightSite


__all__ = ["attach", "carrier", "check_ran", "detach", "forget_compiled", "restore", "seam_at", "snapshot"]

Gates = list[tuple[Any, Gate]]  # sites, and what stands there


def forget_compiled() -> None:
    """Compiled code is not told that a module changed: drop it, so that the next call compiles again."""
    torch.compiler.reset()


def carrier(site: Site) -> tuple[nn.Module, str]:
    """The module that carries the seam of `site`, and the name of the seam there."""
    if isinstance(site, ProjectionSite):
        return site.parent, projection_key(site)
    return site.module, dropout_key(site) if isinstance(site, DropoutSite) else SEAM


def seam_at(site: Site) -> Seam | None:
    module, key = carrier(site)
    return module._modules.get(key)  # type: ignore[return-value]


def _make_seam(site: Site) -> Seam:
    if isinstance(site, DropoutSite) and site.attention is not None:
        return _make_seam(site.attention)
    module, key = carrier(site)
    seam: Seam
    if isinstance(site, WeightSite):
        seam = WeightSeam()
        module.add_module(key, seam)
        connect_weight(site, seam)
    elif isinstance(site, ProjectionSite):
        seam = ProjectionSeam(site.name, site.point)
        module.add_module(key, seam)
        connect_projection(site, seam)
    elif isinstance(site, DropoutSite):
        seam = DropoutSeam()
        module.add_module(key, seam)
        connect_dropout(site, seam)
    else:
        assert isinstance(site, AttentionSite)
        install()
        seam = AttentionSeam(site.kind, site.prefix)
        module.add_module(key, seam)
        connect(module, seam, site.kind)
    return seam


def attach(model: nn.Module, name: str, gates: Gates) -> None:
    """Put `gates` of the patch `name` in place of those that it has on `model`."""
    install_saves()
    detach(model, name, keep={carrier(site) for site, _ in gates})
    for site, gate in gates:
        seam = seam_at(site) or _make_seam(site)
        module, _ = carrier(site)
        reference = next(chain(module.parameters(), model.parameters()), None)  # a dropout module has none
        if reference is not None and not reference.is_meta:  # of a layer that is offloaded: it runs elsewhere
            gate.to(reference.device)
        seam.add_module(name, gate)
        seam.train(module.training)
        gate.attach(model, site)


def detach(model: nn.Module, name: str | None, keep: Collection[tuple[nn.Module, str]] = ()) -> None:
    """Take the gates called `name` (None: all) off, with their hooks, and then the seams left empty."""
    removed: list[Any] = []
    for _, module, key, seam in seams(model):
        taken = [seam._modules.pop(one) for one in list(seam._modules) if name in (None, one)]
        for gate in taken:
            gate.detach(model)  # type: ignore[union-attr,operator]
        removed += taken
        if not seam._modules and (module, key) not in keep:
            removed.append(module._modules.pop(key, seam))  # gone already, if it stood inside of a patched layer
            if isinstance(seam, AttentionSeam):
                disconnect(module)
    if removed:
        for module in model.modules():
            disconnect(module, removed)


def snapshot(model: nn.Module, sites: list[Site]) -> dict[str, Gates]:
    """The gates on `model` by patch, given every place where one may stand."""
    found: dict[str, dict[Any, Any]] = {}
    for site in sites:  # the seams of two sites may be one
        seam = seam_at(site)
        for name, gate in seam._modules.items() if seam is not None else ():
            if isinstance(site, DropoutSite) == isinstance(gate, PlaceGate):
                found.setdefault(name, {})[gate] = site
    return {name: [(site, gate) for gate, site in gates.items()] for name, gates in found.items()}


def restore(model: nn.Module, before: dict[str, Gates]) -> None:
    for name, gates in before.items():
        attach(model, name, gates)


def check_ran(model: nn.Module) -> None:
    """After a training step: raise if no patched module ran its patch, warn by name if some did not.

    Raises:
        `RuntimeError`: if no module of the step went through its patch.
    """
    waiting = {path: seam for path, _, _, seam in seams(model) if seam.enabled()}
    silent = [path for path, seam in waiting.items() if not seam.ran]
    if not silent:
        return
    if len(silent) == len(waiting):
        raise RuntimeError(
            f"The model took a training step, but none of its {len(waiting)} patched modules ran their patch (first: "
            f"{silent[0]}). Its forward does not go through the places where the patches stand; unpatch it, or report "
            "the model type."
        )
    warnings.warn(
        f"{len(silent)} of {len(waiting)} patched modules did not run in this step: {', '.join(silent[:5])}.",
        UserWarning,
        stacklevel=2,
    )
