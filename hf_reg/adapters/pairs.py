"""The weights of two models, layer by layer, adapters counted in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .linear import SvdLinear
from .svd import readable


__all__ = ["Models", "weight_pairs"]

Models = nn.Module | Mapping[str, torch.Tensor]
WRAPPERS = re.compile(
    r"^(?:module\.|_orig_mod\.|base_model\.model\.)+|\.(?:base_layer|_orig_mod|modules_to_save\.[^.]+)(?=\.|$)"
)
RESIDUAL_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations of PEFT that change the base weight


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a model with and without adapters, each adapter layer once, by its plain name."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) or ".original_module" in name:  # PEFT's modules_to_save keep their first self
            continue
        if hasattr(module, "base_layer"):
            inside += (f"{name}.",)
            layer = module.get_base_layer()
        else:
            layer = module
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
            yield WRAPPERS.sub("", name), module


def _adapted(layer: Any) -> torch.Tensor:
    """A weight as it is; of an adapter layer with its active adapters added, in fp32. The layer stays as it is."""
    if isinstance(layer, torch.Tensor):
        return layer
    if getattr(layer, "merged", False):
        raise ValueError("Its adapter is merged into the base weight. Call model.unmerge_adapter() first.")
    if isinstance(layer, SvdLinear):
        adapters = [name for name in layer.active_adapters if name in layer.lora_A]
        return sum((layer.change(name) for name in adapters), readable(layer.pretrained_weight()).float())
    variants = getattr(layer, "lora_variant", {})
    if not hasattr(layer, "get_delta_weight") or any(adapter in variants for adapter in layer.active_adapters):
        raise ValueError(
            f"A {type(layer).__name__} whose change is no plain sum (DoRA, say). Pass the pretrained model as `base` "
            "and a copy of this one after merge_and_unload() as `tuned`."
        )
    weight = readable(layer.get_base_layer().weight).float()
    adapters = [name for name in layer.active_adapters if name in getattr(layer, layer.adapter_layer_names[0])]
    return sum((layer.get_delta_weight(name).to(weight) for name in adapters), weight)


def _named(model: nn.Module | Mapping[str, torch.Tensor], pick: str) -> dict[str, Any]:
    """Layer names to weights, or to the adapter layers that make them; `pick` names the argument in errors."""
    if isinstance(model, nn.Module):
        return {name: layer if hasattr(layer, "base_layer") else layer.weight for name, layer in _linear(model)}
    if not isinstance(model, Mapping):
        raise TypeError(f"{pick}: expected a model (torch.nn.Module) or a state dict, got {type(model).__name__}.")
    if adapter := next((key for key in model if ".lora_" in key), None):
        raise ValueError(f"{pick}: {adapter!r} belongs to an adapter. Pass the PeftModel itself, or a merged model.")
    return {
        WRAPPERS.sub("", key.removesuffix(".weight")): tensor
        for key, tensor in model.items()
        if key.endswith(".weight") and tensor.dim() == 2
    }


def _select(names: Sequence[str], target_modules: str | Sequence[str] | None) -> list[str]:
    """As PEFT does: a string is a regular expression of the whole name, in a list are ends of names."""
    if target_modules is None:
        chosen = list(names)
    elif isinstance(target_modules, str):
        chosen = [name for name in names if re.fullmatch(target_modules, name)]
    else:
        chosen = [name for name in names if any(f".{name}".endswith(f".{end}") for end in target_modules)]
    if not chosen:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
        raise ValueError(f"target_modules={target_modules!r} selects no linear layer; the kinds here: {kinds}.")
    return chosen


def weight_pairs(
    base: Models | None, tuned: Models, target_modules: str | Sequence[str] | None = None
) -> dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """For each layer by name, a function that gives its weight before and after; see [`spectrum_drift`].

    Raises:
        `ValueError`: for layers that only one of the two has, and if nothing is selected; the function, for merged
            adapters and those that are no sum. `TypeError`: for what is neither a model nor a state dict.
    """
    after = _named(tuned, "tuned")
    if base is None:
        after = {name: layer for name, layer in after.items() if isinstance(layer, nn.Module)}
        _check_own_base(tuned, after)
        before = {
            name: layer.pretrained_weight() if isinstance(layer, SvdLinear) else layer.get_base_layer().weight
            for name, layer in after.items()
        }
    else:
        before = _named(base, "base")
    names = _select(list(dict.fromkeys([*after, *before])), target_modules)
    if alone := [name for name in names if name not in before or name not in after]:
        where = "base" if alone[0] in before else "tuned"
        raise ValueError(
            f"{len(alone)} layers are only in one of the models ({alone[0]} in {where}). Compare a model with its own "
            "base, or choose the layers by target_modules."
        )
    return {name: partial(_pair, before[name], after[name]) for name in names}


def _pair(before: Any, after: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _adapted(before), _adapted(after)


def _check_own_base(tuned: Any, adapted: Mapping[str, Any]) -> None:
    """Refuse what has no adapter, and adapters whose base weight is no longer the pretrained one."""
    if not adapted:
        raise ValueError("base=None needs a model with adapters (a PeftModel). Pass the pretrained model as `base`.")
    for config in getattr(tuned, "peft_config", {}).values():
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.startswith(RESIDUAL_BASES):
            raise ValueError(
                f"init_lora_weights={start!r} took its start out of the base weights: they are not the pretrained "
                "ones. Pass the pretrained model as `base`."
            )
