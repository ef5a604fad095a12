"""Where the feed-forward networks of a model are: the activation between their projections, found without running.

A down-projection undoes the change of width of another linear layer of the same model layer, outside attention. Fused
experts hold stacked weights, so their activation function, or the module itself, is the place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from .attention import OWN, find_attention
from .layers import ProjectionSite, layer_key, layer_lists, locate, parent_of


__all__ = ["FfnSite", "find_ffn", "find_ffn_uncovered", "is_fused", "mixes_tokens", "widths"]

FFN = re.compile(r"Mlp|MLP|MultiLayerPerceptron|FeedForward|FFN|Expert|FFWRelativeLayer|ChannelMix|Intermediate")
DOWN = re.compile(
    r"down_proj|fc_?2|fc_out|ff_out|c_proj|w2|wo|lin_?2|linear_?2|layer_2|dense2|conv_?2|dense_4h_to_h|output_dense"
    r"|ffn_output|output_linear|down",
    re.IGNORECASE,
)
# Low-rank side paths, gates and conditioning that change the width and back but are no FFN.
SIDE = re.compile(
    r"per_layer|laurel|router|lora_|hyper|altup|squeeze|time_emb|adapter|rel_pos|relative_position|(pre|post)_expert"
)
SIDE_CLASS = re.compile(r"Conv(olution)?Module|PointWiseConv|(Rms|RMS)Norm$|Bottleneck|AdapterLayer")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class FfnSite(ProjectionSite):
    """The activation of one FFN. `kind` is `"projection"` (the input of the down-projection), `"activation"` (of fused
    experts, at the output of their activation function) or `"experts"` (the input of fused experts, without one)."""

    ups: tuple[str, ...]  # paths of the up-projections (and of the gate, which comes first)
    width: int | None  # of the activation
    gated: bool
    dim: int  # of the tensor that holds the channels: -1, or 1 for convolutions


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear layer, convolutions, GPT-2's Conv1D and PEFT's wrappers included."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, CONVOLUTIONS):
        return (module.in_channels, module.out_channels) if module.groups < module.in_channels else None
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
        found = getattr(module, "in_features", None), getattr(module, "out_features", None)
        return found if all(isinstance(width, int) for width in found) else None  # type: ignore[return-value]
    if isinstance(weight, nn.Parameter) and (weight.dim() == 3 or type(module).__name__ == "QuantLinear"):  # I-BERT
        return weight.shape[-1], weight.shape[-2]  # (experts, out, in): one product for each expert, or each position
    return None


def is_fused(module: nn.Module) -> bool:
    """Experts in one tensor: two or more parameters (experts, in, out), or (experts * in, out) in a class that says
    so."""
    own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    if re.search(r"Expert", type(module).__name__) and len(own) > 1:
        return True
    sizes = Counter(len(p) for p in own if p.dim() == 3 and min(p.shape) > 1)
    return any(count > 1 for count in sizes.values())


def mixes_tokens(module: nn.Module) -> bool:
    """Whether attention, a state space or another mixer stands here, without an FFN in it."""
    if OWN.search(type(module).__name__) is None:
        return False
    return not any(FFN.search(type(inner).__name__) for inner in module.modules())


@dataclass(frozen=True)
class _Linear:
    path: str
    module: nn.Module
    into: int
    out: int
    called_ffn: bool  # by the class of what holds it

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def named(self) -> bool:
        name = self.path.rpartition(".")[2]
        return DOWN.fullmatch(name) is not None or (name == "dense" and self.parent.rpartition(".")[2] == "output")


def _walk(path: str, module: nn.Module, mixers: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """What is in a layer beside its mixers, down to the linear layers and the fused experts."""
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if child in mixers or mixes_tokens(child) or SIDE.search(name) or SIDE_CLASS.search(type(child).__name__):
            continue
        yield here, child
        if widths(child) is None:
            yield from _walk(here, child, mixers)


def _downs(linears: list[_Linear]) -> Iterator[tuple[_Linear, list[_Linear]]]:
    """The down-projections among the linear layers of one layer, with the up-projections that they undo."""

    def undone(one: _Linear) -> list[_Linear]:
        """The layers that `one` undoes; a narrowing of joined inputs counts inside of what is called an FFN."""
        return [
            o
            for o in linears
            if o is not one
            and o.out in (one.into, 2 * one.into)
            and (o.into == one.out or (one.named and one.called_ffn and o.parent == one.parent and o.out == one.into))
            and (type(o.module) is type(one.module) or not isinstance(one.module, CONVOLUTIONS))
        ]

    def near(one: _Linear, others: list[_Linear]) -> list[_Linear]:
        """Those with the longest common path: a layer may hold several FFNs."""

        def common(other: _Linear) -> int:
            pairs = zip(one.path.split("."), other.path.split("."), strict=False)
            return next((i for i, (a, b) in enumerate(pairs) if a != b), 0)

        closest = max(map(common, others))
        return [other for other in others if common(other) == closest]

    pairs = {one.path: near(one, found) for one in linears if (found := undone(one))}
    order = {one.path: place for place, one in enumerate(linears)}
    for one in linears:
        ups = pairs.get(one.path, [])
        if not ups:
            continue
        rivals = [up for up in ups if one in pairs.get(up.path, [])]  # which undo this one as well
        if one.named or not rivals:
            ok = one.named or one.into != one.out
        elif any(up.named for up in rivals):
            ok = False
        else:
            ok = one.into != one.out and all(order[up.path] < order[one.path] for up in rivals)
        if ok:
            yield one, [up for up in ups if not up.named or up not in rivals] or ups


def _called_ffn(model: nn.Module, path: str) -> bool:
    return FFN.search(type(model.get_submodule(path.rpartition(".")[0])).__name__) is not None


def _fused_place(path: str, experts: nn.Module) -> tuple[str, nn.Module, str]:
    """Where to stand in fused experts: their activation function, or else what they take in."""
    for name, child in experts.named_children():
        if re.search(r"act", name) and next(child.parameters(), None) is None:
            return f"{path}.{name}", child, "activation"
    return path, experts, "experts"


def find_ffn(model: nn.Module) -> list[FfnSite]:
    """The FFNs of `model`, in the order of `named_modules`."""
    lists = layer_lists(model)
    mixers = {site.module for site in find_attention(model)}
    scopes: dict[str, None] = {}
    for path, module in model.named_modules():
        listed = path.rpartition(".")[0] in lists
        mixing = module in mixers or mixes_tokens(module)
        if mixing or (listed and FFN.search(type(module).__name__)):  # XLM keeps its FFNs in a list of their own
            key = layer_key(f"{path}.x" if listed else path, lists)
            key = key[:-1] if mixing and key[-1:] == (path,) else key  # a list of mixers inside of a layer
            if key:
                scopes[key[-1]] = None
    kinds = {(path.rpartition(".")[0], type(model.get_submodule(path))) for path in scopes}
    for path, module in model.named_modules():  # Nemotron-H mixes tokens in some layers and has its FFNs in others
        if (path.rpartition(".")[0], type(module)) in kinds and path.rpartition(".")[0] in lists:
            if any(FFN.search(type(inner).__name__) for inner in module.modules()):
                scopes[path] = None
    found: list[tuple[str, nn.Module, str, tuple[str, ...], int | None, bool, str]] = []
    for scope in scopes:
        inside = list(_walk(scope, model.get_submodule(scope), mixers))
        linears = [
            _Linear(path, module, *found_widths, _called_ffn(model, path))
            for path, module in inside
            if (found_widths := widths(module)) is not None
        ]
        for down, ups in _downs(linears):
            gated = len(ups) > 1 or ups[0].out == 2 * down.into
            paths = tuple(up.path for up in ups)
            found.append((down.path, down.module, "projection", paths, down.into, gated, scope))
        for path, module in inside:
            if is_fused(module):
                here, target, kind = _fused_place(path, module)
                found.append((here, target, kind, (), None, True, scope))
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    found = sorted({one[0]: one for one in found}.values(), key=lambda one: order[one[0]])
    located = locate(model, [one[0] for one in found], lists, [f"{one[-1]}.x" for one in found])
    return [
        FfnSite(
            module, path, *where, *parent_of(model, path), kind,
            "output" if kind == "activation" else "input", ups, width, gated,
            1 if isinstance(module, CONVOLUTIONS) else -1,
        )
        for (path, module, kind, ups, width, gated, _), where in zip(found, located, strict=True)
    ]  # fmt: skip


def find_ffn_uncovered(model: nn.Module, sites: list[FfnSite]) -> dict[str, int]:
    """Modules of layers that are called FFNs and hold nothing that was found, by class name."""
    lists = layer_lists(model)
    mixing = [path for path, module in model.named_modules() if mixes_tokens(module)]
    layers = {key[-1] for path in mixing if (key := layer_key(path, lists))}
    found = [site.path for site in sites] + [up for site in sites for up in site.ups]
    uncovered: Counter[str] = Counter()
    taken: list[str] = []
    for path, module in model.named_modules():
        if FFN.search(type(module).__name__) is None or next(module.parameters(), None) is None:
            continue
        if not any(path.startswith(f"{layer}.") for layer in layers):
            continue
        near = any(one == path or one.startswith(f"{path}.") or path.startswith(f"{one}.") for one in found)
        if not near and not any(path.startswith(f"{one}.") for one in taken):
            taken.append(path)
            uncovered[type(module).__name__] += 1
    return dict(uncovered)
