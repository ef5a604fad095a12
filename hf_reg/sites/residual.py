"""Where the residual branches of a model end: the output projection of attention, and that of the FFN.

What a layer adds to its residual stream leaves through a projection: a factor on what leaves there is a factor on the
branch, whatever dropout, layer scale or norm of the sum follows. A mixture of experts ends where its block does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .attention import AttentionSite, find_attention
from .ffn import find_ffn, widths
from .layers import ProjectionSite, layer_key, layer_lists, locate, parent_of


__all__ = ["BranchSite", "find_branches"]

OUT = ("o_proj", "out_proj", "o", "out_lin", "c_proj", "dense", "proj", "Wo", "wo", "linear_out", "projection")


@dataclass(frozen=True)
class BranchSite(ProjectionSite):
    """The end of one residual branch. `kind` is `"attention"` or `"ffn"`."""


def _out_projection(model: nn.Module, site: AttentionSite) -> str | None:
    """Path of the output projection of an attention module: its own, or that of the sibling `output` (BERT)."""
    linears = [name for name, child in site.module.named_children() if widths(child) is not None]
    named = next((name for name in OUT if name in linears), None)
    if named:
        return f"{site.path}.{named}"
    parent_path = site.path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    for sibling in ("output", "dense", "out_proj", "o_proj", "proj"):
        child = getattr(parent, sibling, None)
        if not isinstance(child, nn.Module):
            continue
        if widths(child) is not None:
            return f"{parent_path}.{sibling}"
        inner = next((name for name in OUT if widths(getattr(child, name, nn.Identity())) is not None), None)
        if inner:
            return f"{parent_path}.{sibling}.{inner}"
    return f"{site.path}.{linears[-1]}" if linears else None


def _ffn_end(model: nn.Module, path: str, kind: str, layer: str) -> str:
    """Path of what ends the branch of an FFN: the down-projection, or the block that holds the experts."""
    parts = path.split(".")
    depth = len(layer.split("."))
    for i in range(depth + 1, len(parts)):
        block = model.get_submodule(".".join(parts[:i]))
        listed = isinstance(block.get_submodule(parts[i]), (nn.ModuleList, nn.ModuleDict))
        if listed or (kind != "projection" and "experts" in parts[i]):
            return ".".join(parts[:i])
    return path.rpartition(".")[0] if kind == "activation" else path


def find_branches(model: nn.Module) -> list[BranchSite]:
    """The residual branches of `model`, in the order of `named_modules`."""
    lists = layer_lists(model)
    found = {path: "attention" for site in find_attention(model) if (path := _out_projection(model, site)) is not None}
    for site in find_ffn(model):
        key = layer_key(site.path, lists)
        found[_ffn_end(model, site.path, site.kind, key[-1] if key else "")] = "ffn"
    found = {path: kind for path, kind in found.items() if not any(path.startswith(f"{other}.") for other in found)}
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    paths = sorted(found, key=order.__getitem__)
    located = locate(model, paths, lists)
    return [
        BranchSite(
            model.get_submodule(path), path, *where, *parent_of(model, path), found[path], "output"
        )
        for path, where in zip(paths, located, strict=True)
    ]  # fmt: skip
