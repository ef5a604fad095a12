"""The weight seam: patches that train other tensors in place of a weight, their gates beside the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..base import Gate, Patch, check_choice
from ..sites.weights import WeightSite
from .attention import SEAM, Seam, gates
from .own_attention import SeamHook, disconnect
from .reparameterized import Reparameterized, Start, make_dense, reparameterize


__all__ = ["WeightGate", "WeightPatch", "WeightSeam", "connect_weight"]

BRANCHES = ("all", "attention", "ffn")


@dataclass(frozen=True)
class WeightPatch(Patch):
    """Base of the patches at this seam: `initial` makes the tensors that stand in for a weight, `layer_kind` uses
    them."""

    seam: ClassVar[str] = "weights"
    acts_on: ClassVar[str] = "a linear layer of the chosen kind"
    replaces_parameters: ClassVar[bool] = True
    layer_kind: ClassVar[type[Reparameterized]]

    branch: str = "all"

    def __post_init__(self) -> None:
        check_choice(self.name, "branch", self.branch, BRANCHES)
        super().__post_init__()

    def accepts(self, site: WeightSite) -> bool:
        return self.branch in ("all", site.kind)

    def initial(self, layer: nn.Module, weight: torch.Tensor) -> Start:
        """The tensors for `weight`, in the orientation of the stock `layer`, named `weight_*`."""
        raise NotImplementedError(f"{type(self).__name__} must define `initial(layer, weight)`.")

    def check(self, model: nn.Module, site: WeightSite) -> None:
        layer, where = site.module, f"{self.name}: {site.path or 'the model'}"
        if hasattr(layer, "base_layer"):
            raise ValueError(
                f"{where} carries an adapter, which trains instead of the weight. Merge it first (merge_and_unload), "
                "leave the layer out with `layers` or `branch`, or train the adapter without this patch."
            )
        other = getattr(getattr(layer, "source", None), "name", self.name)
        if other != self.name:
            raise ValueError(f"{where} is under {other!r} already; unpatch_model(model, {other!r}) first.")
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if "weight" not in layer._parameters and not isinstance(layer, Reparameterized):
            raise ValueError(f"{where} computes its weight already (a weight norm?). Remove that first.")
        if not weight.is_floating_point():
            raise ValueError(
                f"{where} is quantised ({type(layer).__name__}, {weight.dtype}). Load the model unquantised."
            )
        empty = weight.is_meta and all(parameter.is_meta for parameter in model.parameters())  # only to look at
        if (weight.is_meta and not empty) or weight.numel() == 0 or hasattr(weight, "full_tensor"):
            raise ValueError(
                f"{where} holds a shard or a placeholder ({type(weight).__name__} on {weight.device}), no weight. "
                "Patch before FSDP2 or ZeRO-3 shards, and with all weights loaded; train with DDP or ZeRO-1 / 2."
            )
        if not empty and not torch.isfinite(weight).all():
            raise ValueError(f"{where} has weights that are not finite. Load the checkpoint again.")
        own = layer._parameters.get("weight")
        holders = [m for m in model.modules() if own is not None and any(own is p for p in m._parameters.values())]
        if len(holders) > 1:
            raise ValueError(
                f"{where} shares its weight with {len(holders) - 1} other modules ({type(holders[-1]).__name__}), "
                "which would stay behind. Leave the layer out with `layers` or `branch`, or untie the weights."
            )
        if any(getattr(gate, "sliceable", None) for gate in gates(model)):
            raise ValueError(
                f"{where} may be sliced by drophead with skip=True, which has taken a step already. Unpatch it, patch "
                f"{self.name} and then drophead again: it will skip attention only."
            )

    def gate(self, site: WeightSite) -> WeightGate:
        return WeightGate(self, site)


class WeightGate(Gate):
    """Owns nothing: the layer itself holds the trained tensors while the gate is on."""

    patch: WeightPatch

    def __init__(self, patch: WeightPatch, site: WeightSite) -> None:
        super().__init__(patch)
        layer, self.path = site.module, site.path
        self.held = (layer,)  # in a tuple, or it would be a child
        weight: Any = layer.weight
        with torch.no_grad():
            self.start: Start | None = patch.initial(layer, weight.detach())
        now = layer.own().values() if isinstance(layer, Reparameterized) else [weight]
        trained = any(tensor.requires_grad for tensor in now)
        for tensor in self.start.values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(trained)

    def attach(self, model: nn.Module, site: WeightSite) -> None:
        layer, again = site.module, self.start is None
        if again:  # put back by `patched`: the same parameters, for an optimizer may know them
            self.start = self._left
        assert self.start is not None
        weight = layer.weight.detach()  # type: ignore[operator]
        reparameterize(layer, self.patch.layer_kind, self.patch, self.start)
        self.held, self.start = (layer,), None
        if again:
            layer.take(weight)  # type: ignore[operator]

    def detach(self, model: nn.Module) -> None:
        layer = self.held[0]
        assert isinstance(layer, Reparameterized)
        for name in [name for name in layer._modules if name.startswith(SEAM)]:  # patches of its inside go with it
            inside: Any = layer._modules.pop(name)
            for module in layer.modules():
                disconnect(module, [inside, *inside.children()])
        self._left = make_dense(layer)


class WeightSeam(Seam):
    """The gate of one linear layer, in the module that holds the layer."""


class _Ran(SeamHook):
    """Forward pre-hook of the layer."""

    def __init__(self, seam: WeightSeam) -> None:
        self.owner = seam

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            for gate in self.owner.children():
                gate.ran = True


class _Stays(SeamHook):
    """Forward pre-hook of the module that holds the layer: nothing may be wrapped around it, for what adapters merge
    into `weight` would be lost."""

    def __init__(self, seam: WeightSeam, layer: nn.Module, name: str) -> None:
        self.owner, self.layer, self.name = seam, layer, name

    def __call__(self, module: nn.Module, args: Sequence[Any]) -> None:
        if module._modules[self.name] is not self.layer:
            raise RuntimeError(
                f"{type(module._modules[self.name]).__name__} took the place of a layer that is patched at its weight "
                f"({self.name}). Call unpatch_model(model) before adapters are added."
            )


def connect_weight(site: WeightSite, seam: WeightSeam) -> None:
    """Leave the hooks that watch over the layer at `site`."""
    site.module.register_forward_pre_hook(_Ran(seam))
    site.parent.register_forward_pre_hook(_Stays(seam, site.module, site.name))
