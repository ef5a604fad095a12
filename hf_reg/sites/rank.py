"""Where the rank of a factorized layer is an activation: between A and B of LoRA, and where a layer says so.

A layer of one's own takes part by a module that its rank activation, or one of its factors, goes into, and that has
an attribute `rank_dim` (`int`): the dimension of its input that is the rank, such as

    class Rank(nn.Identity):
        rank_dim = -1

between the two factors, or with `rank_dim = 0` around V^T, (r, in), where the weight is built as U V^T.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import nn

from .layers import ProjectionSite, layer_lists, locate


__all__ = ["RankSite", "find_ranks"]


@dataclass(frozen=True)
class RankSite(ProjectionSite):
    """The input of what follows the rank. `kind` is `"adapter"` or `"factorized"`."""

    dim: int  # of the rank
    variant: str  # of the adapter (DoRA), where it computes with the factors themselves; else ""


def find_ranks(model: nn.Module) -> list[RankSite]:
    """The rank activations of `model`, in the order of `named_modules`."""
    found: list[tuple[str, nn.Module, str, str, int, str]] = []
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapter, after in module.lora_B.items():
                variant = type(module.lora_variant[adapter]).__name__ if adapter in module.lora_variant else ""
                dim = 1 if isinstance(after, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else -1
                found.append((path, module, f"lora_B.{adapter}", "adapter", dim, variant))
        elif isinstance(getattr(module, "rank_dim", None), int):
            parent, _, name = path.rpartition(".")
            found.append((parent, model.get_submodule(parent), name, "factorized", module.rank_dim, ""))
    paths = [f"{parent}.{name}" if parent else name for parent, _, name, *_ in found]
    return [
        RankSite(parent.get_submodule(name), path, *where, parent, name, kind, "input", dim, variant)
        for path, (_, parent, name, kind, dim, variant), where in zip(
            paths, found, locate(model, paths, layer_lists(model)), strict=True
        )
    ]
