"""Where a transformers model can be touched: its attention modules, found without running it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .layers import Site, layer_lists, locate


__all__ = ["AttentionSite", "find_attention", "find_uncovered"]

CROSS = re.compile(r"cross|encoder_?attn|EncDec|encoder_decoder_attention", re.IGNORECASE)
OWN = re.compile(r"attention|attn|mamba|deltanet|mixer2?$|rwkv|lightning|recurrent|longconv", re.IGNORECASE)
MASK_ARGUMENT = ("DisentangledSelfAttention",)
NAME = re.compile(r"attention|attn", re.IGNORECASE)
# Auto-correlation, chunked or sliding scores: nothing of the shape (B, H, Tq, Tk) to find a mask or a head in.
OTHER_SHAPES = (
    "AutoformerAttention",
    "Gemma3nAudioAttention",
    "Gemma4AudioAttention",
    "HieraMaskUnitAttention",
    "LongformerSelfAttention",
)
# What an attention module that computes attention by itself refers to; the last one, without `get_interface`, is a
# look-up that passes the interface by (Kosmos-2.5).
ARITHMETIC = (
    "softmax",
    "Softmax",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "ALL_ATTENTION_FUNCTIONS",
)


@dataclass(frozen=True)
class AttentionSite(Site):
    """One attention module of a model, and what is known about it without running the model."""

    cross: bool
    heads: int | None
    groups: int | None  # key/value heads, each shared by heads / groups query heads
    kind: str  # "interface", "mask_argument" or "operations": how it is reached (seams/own_attention.py)
    prefix: bool  # whether it takes a key/value cache

    @property
    def implementation(self) -> str | None:
        """The attention backend that the module's configuration asks for."""
        return getattr(getattr(self.module, "config", None), "_attn_implementation", None)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _functions(function: Any) -> Iterator[Any]:
    """`function` and what its decorators hide: `__wrapped__` and closure cells."""
    while function is not None:
        if hasattr(function, "__code__"):
            yield function
        for cell in getattr(function, "__closure__", None) or ():
            inner = cell.cell_contents
            if hasattr(inner, "__code__") and inner is not getattr(function, "__wrapped__", None):
                yield inner
        function = getattr(function, "__wrapped__", None)


@functools.cache
def class_names(cls: type[nn.Module]) -> frozenset[str]:
    """Every global and attribute name used in the methods of `cls` and its bases below `nn.Module`."""
    found: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for member in vars(base).values():
            for function in _functions(getattr(member, "__func__", member)):
                found.update(_names(function.__code__))
    return frozenset(found)


def uses_interface(module: nn.Module) -> bool:
    """Whether the class of `module` dispatches its attention through transformers' interface."""
    return not isinstance(module, PreTrainedModel) and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= class_names(
        type(module)  # type: ignore[arg-type]
    )


def reach(module: nn.Module) -> str | None:
    """How an attention module outside the interface can be reached; None if it cannot, or is none."""
    name = type(module).__name__
    if name in MASK_ARGUMENT:
        return "mask_argument"
    if isinstance(module, (PreTrainedModel, nn.MultiheadAttention)) or name in OTHER_SHAPES or not NAME.search(name):
        return None
    names = class_names(type(module))  # type: ignore[arg-type]
    if names.isdisjoint(ARITHMETIC) or count_heads(module) is None:
        return None
    return "operations"


def takes_argument(module: nn.Module, *names: str) -> bool:
    return not set(names).isdisjoint(inspect.signature(module.forward).parameters)


def count_heads(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    for owner in (module, config):
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "encoder_attention_heads"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def count_groups(module: nn.Module) -> int | None:
    heads = count_heads(module)
    for owner in (module, getattr(module, "config", None)):
        groups, repeats = getattr(owner, "num_key_value_heads", None), getattr(owner, "num_key_value_groups", None)
        if isinstance(groups, int):
            return groups
        if heads is not None and isinstance(repeats, int):
            return heads // repeats
    return heads


def find_attention(model: nn.Module) -> list[AttentionSite]:
    """Every attention module of `model` that can be patched, in the order of `named_modules`."""
    found: list[tuple[str, nn.Module, str]] = []
    for path, module in model.named_modules():
        kind = "interface" if uses_interface(module) else reach(module)
        if kind is not None:
            found.append((path, module, kind))
    reached = [path for path, _, _ in found]
    found = [  # of nested own-code modules only the innermost one computes attention
        (path, module, kind)
        for path, module, kind in found
        if kind == "interface" or not any(other.startswith(f"{path}.") for other in reached)
    ]
    located = locate(model, [path for path, _, _ in found], layer_lists(model))
    sites = []
    for (path, module, kind), (submodel, submodel_class, layer, layers) in zip(found, located, strict=True):
        cross = bool(getattr(module, "is_cross_attention", False)) or bool(
            CROSS.search(type(module).__name__)
            or CROSS.search(path.removeprefix(f"{submodel}.") if submodel else path)
        )
        prefix = takes_argument(module, "past_key_values", "past_key_value", "layer_past")
        heads, groups = count_heads(module), count_groups(module)
        sites.append(
            AttentionSite(
                module, path, submodel, submodel_class, layer, layers, cross, heads, groups, kind, prefix
            )
        )  # fmt: skip
    return sites


def _mixes_tokens(module: nn.Module) -> bool:
    name = type(module).__name__
    return bool(OWN.search(name)) and not re.search(r"Norm|Embed|Rotary|Output$", name)


def find_uncovered(model: nn.Module, sites: Sequence[Site]) -> dict[str, int]:
    """Modules that mix tokens but are out of reach (linear attention, state spaces, own kernels), by class name."""
    reached = {site.path for site in sites}
    uncovered: dict[str, int] = {}
    taken: list[str] = []
    for path, module in model.named_modules():
        if not _mixes_tokens(module) or next(module.parameters(), None) is None:
            continue
        if any(path == r or r.startswith(f"{path}.") or path.startswith(f"{r}.") for r in reached):
            continue
        if isinstance(module, PreTrainedModel) or any(path.startswith(f"{t}.") for t in taken):
            continue
        if any(_mixes_tokens(child) and next(child.parameters(), None) is not None for child in module.children()):
            continue
        taken.append(path)
        uncovered[type(module).__name__] = uncovered.get(type(module).__name__, 0) + 1
    return uncovered
