"""Not computing dropped heads: attention of the kept heads only, and slices of the projections around it.

Under grouped-query attention the unit is a key/value group with all its query heads. The projections are sliced by
letting the *instance dictionary* of a Linear shadow its weight while its forward runs: the parameters, the state dict
and the forward stay what they are, and the gradient of a slice is a full gradient with zeros. Whether a model's
forward bears that is not guessed: on the first training step each module computes its output both ways, and slices
only if the two agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from .own_attention import SeamHook


if TYPE_CHECKING:
    from ..patches.drophead import DropHeadGate


__all__ = ["Projection", "attend_kept", "connect_projections", "find_projections"]

APART = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"))
FUSED = {
    "c_attn": 3,
    "qkv_proj": 3,
    "qkv": 3,
    "Wqkv": 3,
    "query_key_value": 1,
}  # [q | k | v], or q, k and v of each head in turn
SIZES = (
    "split_size",
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "n_heads",
    "embed_dim",
    "inner_dim",
    "all_head_size",
)
OUT = ("o_proj", "out_proj", "o", "out_lin", "c_proj", "dense", "proj", "Wo")


@dataclass(frozen=True)
class Projection:
    """A linear layer around the attention of one module, seen as a grid of kv groups.

    Args:
        path (`str`): from the block that holds all projections.
        role (`str`): `"in"` (its outputs are heads) or `"out"` (its inputs are).
        blocks (`int`): consecutive parts of the head dimension, each ordered by group: 1, or 3 for fused [q | k | v].
    """

    path: str
    role: str
    blocks: int = 1


def _linear(module: nn.Module | None) -> bool:
    return type(module) in (nn.Linear, Conv1D)


def _width(module: nn.Module, role: str) -> int:
    assert isinstance(module.weight, torch.Tensor)
    shape = module.weight.shape
    return int(shape[0] if (role == "in") == (type(module) is nn.Linear) else shape[1])


def find_projections(model: nn.Module, path: str, heads: int | None) -> tuple[nn.Module, list[Projection]] | None:
    """The block around the attention module at `path` and its projections, or None if they are no plain linear
    layers."""
    if heads is None:
        return None
    module = model.get_submodule(path)
    inputs = next((names for names in APART if all(_linear(getattr(module, n, None)) for n in names)), None)
    fused = next((name for name in FUSED if _linear(getattr(module, name, None))), None)
    if inputs is not None:
        found = [Projection(name, "in") for name in inputs]
        width = _width(getattr(module, inputs[0]), "in")
    elif fused is not None:
        width = _width(getattr(module, fused), "in") // 3
        found = [Projection(fused, "in", FUSED[fused])]
    else:
        return None
    block, prefix = module, ""
    out = next((name for name in OUT if _linear(getattr(module, name, None))), None)
    if out is None:  # BERT: the output projection stands in a sibling, and the parent holds both
        parent_path, _, name = path.rpartition(".")
        block, prefix = model.get_submodule(parent_path), f"{name}."
        out = next((f"output.{n}" for n in OUT if _linear(getattr(getattr(block, "output", None), n, None))), None)
        if out is None:
            return None
    if _width(block.get_submodule(out), "out") != width or width % heads:
        return None
    return block, [*(Projection(prefix + p.path, p.role, p.blocks) for p in found), Projection(out, "out")]


def _take(weight: torch.Tensor, dim: int, kept: torch.Tensor, groups: int, blocks: int) -> torch.Tensor:
    """The kept groups of `weight` along `dim`."""
    shape = weight.shape
    grid = weight.unflatten(dim, (blocks, groups, shape[dim] // blocks // groups))
    return grid.index_select(dim + 1, kept.to(weight.device)).flatten(dim, dim + 2)


class Slice(SeamHook):
    """Forward pre-hook of one projection: its weight is shadowed by the slice of the kept groups."""

    def __init__(self, gate: DropHeadGate, projection: Projection) -> None:
        self.owner, self.projection = gate, projection

    def __call__(self, linear: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        gate, role = self.owner, self.projection.role
        if gate.kept is None or not gate.slicing or len(gate.kept) == gate.groups:
            return
        kept, groups, blocks = gate.kept, gate.groups, self.projection.blocks
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        assert weight is not None
        width = _width(linear, role)
        if role == "out" and args[0].shape[-1] != width // groups * len(kept):
            return
        rows = (role == "in") == isinstance(linear, nn.Linear)
        linear.__dict__["weight"] = _take(weight, 0 if rows else 1, kept, groups, blocks)
        if role == "in":
            if bias is not None:
                linear.__dict__["bias"] = _take(bias, 0, kept, groups, blocks)
            if isinstance(linear, Conv1D):
                linear.nf = width // groups * len(kept)
        linear.__dict__["_hf_reg_sliced"] = True


class Unslice(SeamHook):
    """Forward hook of one projection, called after an exception as well: the parameters show again."""

    def __init__(self, gate: DropHeadGate) -> None:
        self.owner = gate

    def __call__(self, linear: nn.Module, args: Any, output: Any) -> None:
        if linear.__dict__.pop("_hf_reg_sliced", False):
            linear.__dict__.pop("weight")
            linear.__dict__.pop("bias", None)
            if isinstance(linear, Conv1D):
                linear.nf = linear.weight.shape[1]


class Draw(SeamHook):
    """Forward pre-hook of the block: draws the heads of this pass, before its first projection runs."""

    def __init__(self, gate: DropHeadGate, attention: nn.Module) -> None:
        self.owner, self.attention = gate, attention

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gate = self.owner
        gate.kept = None
        if not gate.enabled() or torch.compiler.is_compiling():
            return
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        if caches:  # the cache keeps every head, so the projections compute every head
            gate.slicing = False
            gate.kept = gate.draw_groups()
            return
        if gate.sliceable is None:
            gate.sliceable = self.agrees(block, gate, args, kwargs)
        gate.slicing = gate.sliceable
        gate.kept = gate.draw_groups()
        _split(self.attention, gate)

    def agrees(self, block: nn.Module, gate: DropHeadGate, args: Any, kwargs: Any) -> bool:
        """Whether slicing gives what computing everything and dropping afterwards gives, on this very input."""
        training = {module: module.training for module in block.modules()}
        gate.kept = torch.arange(1, gate.groups)  # all groups but the first
        try:
            block.eval()
            gate.forced = True
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                gate.slicing = False
                expected = _first(block.forward(*args, **kwargs))
                gate.slicing = True
                _split(self.attention, gate)
                sliced = _first(block.forward(*args, **kwargs))
            return expected.shape == sliced.shape and torch.allclose(expected, sliced, rtol=1e-2, atol=1e-3)
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ):  # a forward that counts on every head: its own projections stay whole
            return False
        finally:
            _unsplit(self.attention)
            gate.kept, gate.forced = None, False
            for module, mode in training.items():
                module.training = mode


class Rejoin(SeamHook):
    """Forward hook of the block, called after an exception as well: ends the pass."""

    def __init__(self, gate: DropHeadGate, attention: nn.Module) -> None:
        self.owner, self.attention = gate, attention

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        self.owner.kept = None
        _unsplit(self.attention)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _split(attention: nn.Module, gate: DropHeadGate) -> None:
    """Sizes that the forward reads from its module (GPT-2 splits a fused output, OPT reshapes) follow the slices for
    this pass."""
    if gate.slicing and gate.kept is not None:
        sizes = {name: value for name in SIZES if isinstance(value := attention.__dict__.get(name), int)}
        attention.__dict__["_hf_reg_sizes"] = sizes
        for name, value in sizes.items():
            attention.__dict__[name] = value // gate.groups * len(gate.kept)


def _unsplit(attention: nn.Module) -> None:
    attention.__dict__.update(attention.__dict__.pop("_hf_reg_sizes", {}))


def connect_projections(model: nn.Module, path: str, gate: DropHeadGate) -> bool:
    """Leave the hooks on the block around the attention module at `path`; False if it has no plain projections."""
    found = find_projections(model, path, gate.heads)
    if found is None:
        return False
    block, projections = found
    attention = model.get_submodule(path)
    block.register_forward_pre_hook(Draw(gate, attention), with_kwargs=True)
    block.register_forward_hook(Rejoin(gate, attention), always_call=True)
    for projection in projections:
        linear = block.get_submodule(projection.path)
        linear.register_forward_pre_hook(Slice(gate, projection))
        linear.register_forward_hook(Unslice(gate), always_call=True)
    return True


def attend_kept(gate: DropHeadGate, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for the kept heads only; the model sees the full output, with zeros, unless its projections are
    sliced."""

    def attend(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        kept = gate.kept
        if kept is None:  # no projections to draw for
            gate.groups = key.shape[1]
            kept = gate.draw_groups()
        groups, heads = gate.groups, gate.heads or query.shape[1]
        if len(kept) < groups:
            sliced = query.shape[1] * groups == heads * len(kept)

            def take(x: torch.Tensor, dim: int) -> torch.Tensor:
                return _take(x, dim, kept, groups, 1) if x.shape[dim] == heads else x

            if not sliced:
                query, key, value = (_take(x, 1, kept, groups, 1) for x in (query, key, value))
            if isinstance(mask, torch.Tensor):
                mask = take(mask, 1)
            for name in ("position_bias", "s_aux", "sinks"):
                if kwargs.get(name) is not None:
                    kwargs[name] = take(kwargs[name], kwargs[name].dim() - 3 if name == "position_bias" else 0)
        output, weights = function(module, query, key, value, mask, **kwargs)
        factor = groups / len(kept) if gate.patch.rescale == "kept" else 1 / (1 - gate.p * gate.factor)
        if factor != 1:
            output = output * factor
        if len(kept) < groups and not sliced:
            index = torch.arange(heads).unflatten(0, (groups, -1))[kept].flatten().to(output.device)
            output = output.new_zeros(*output.shape[:2], heads, output.shape[3]).index_copy(2, index, output)
            if weights is not None:
                weights = weights.new_zeros(weights.shape[0], heads, *weights.shape[2:]).index_copy(1, index, weights)
        return output, weights

    return attend
