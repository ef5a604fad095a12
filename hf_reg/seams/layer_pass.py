"""What the gates of one patch know of the layer that runs: its examples, the mask of its tokens, and a common draw.

Gradient checkpointing repeats the forward of a layer, without the layer's own hooks. So what is known comes from
inside of it: from the hooks of its self-attention, which runs before the FFN, and from the branches themselves.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..base import Gate
from ..sites.attention import find_attention
from ..sites.layers import Site, layer_key, layer_lists
from .masks import BLOCKED, BlockView
from .own_attention import SeamHook


__all__ = ["LayerPass", "check_batch_first", "holds_attention", "layer_of", "share_pass"]

MASKS = ("attention_mask", "attn_mask", "mask")
TIME_FIRST = ("FSMT", "XLNet", "BridgeTower")  # whose layers take (T, B, C); seen by running every architecture


def layer_of(model: nn.Module, site: Site) -> nn.Module | None:
    """The layer that holds `site`, if it stands in a list of layers."""
    key = layer_key(site.path, layer_lists(model))
    return model.get_submodule(key[-1]) if key else None


def holds_attention(layer: nn.Module) -> bool:
    """Whether attention is one branch among others here (XLM has a list of attentions and one of FFNs instead)."""
    return any(site.module is not layer for site in find_attention(layer))


def check_batch_first(method: str, site: Site, remedy: str) -> None:
    """Raise `ValueError` for the models whose layers have time before examples."""
    if site.submodel_class.startswith(TIME_FIRST):
        raise ValueError(
            f"{method}: the layers of {site.submodel_class} have tokens before examples, (T, B, C); {remedy}."
        )


class LayerPass:
    """One pass through one layer."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.drawn: torch.Tensor | None = None
        self.users: tuple[str, ...] = ()  # the branches that have used it
        self.known = False  # whether self-attention has begun in this pass
        self.mask: Any = None  # its attention mask
        self.shape: torch.Size | None = None  # of what it takes in

    def __reduce__(self) -> Any:  # copies and pickles begin afresh
        return LayerPass, ()

    def draw(self, user: str, rows: int, device: torch.device) -> torch.Tensor:
        """Uniform numbers, one a row, the same for all branches of a pass. A branch that asks again begins another."""
        if self.drawn is None or user in self.users:
            self.drawn, self.users = torch.rand(rows, device=device), ()
        if len(self.drawn) != rows:
            raise ValueError(f"{user} has {rows} rows, {', '.join(self.users)} before it {len(self.drawn)}.")
        self.users += (user,)
        return self.drawn

    def flattened(self, states: torch.Tensor) -> bool:
        """Whether `states`, (B * T, C), are the tokens of the layer in their order."""
        given = self.shape
        return states.dim() == 2 and given is not None and len(given) > 2 and len(states) == given[0] * given[1]

    def by_example(self, states: torch.Tensor, method: str, remedy: str) -> torch.Tensor:
        """`states` as (B, T, ...), of whatever shape a branch puts out (OPT's FFN: (B * T, C)).

        Raises:
            `ValueError`: if its rows are not the examples that the layer was given: windows, tokens in another order.
        """
        given = self.shape
        if states.dim() > 2 and (given is None or states.shape[0] == given[0]):
            return states
        if given is not None and self.flattened(states):
            return states.view(given[0], given[1], -1)
        layer = "" if given is None else f" in a layer whose attention takes {tuple(given)}"
        raise ValueError(f"{method}: {tuple(states.shape)}{layer} cannot be told apart by examples; {remedy}.")

    def real(self, states: torch.Tensor) -> torch.Tensor:
        """Which tokens of `states`, (B, T, C), are no padding: (B, T) bool.

        Raises:
            `ValueError`: if the mask is about another number of tokens, or no self-attention has run before.
        """
        batch, tokens = states.shape[:2]
        mask = self.mask
        if not self.known:
            raise ValueError(
                "No self-attention has run before in this layer, so padding cannot be told; leave such branches out "
                "with `branch='attention'`, `layers=` or `submodel=`."
            )
        if mask is None:
            return torch.ones(batch, tokens, dtype=torch.bool, device=states.device)
        if not isinstance(mask, torch.Tensor):  # flex attention's BlockMask
            queries, keys = mask.shape[-2:]
            real = BlockView(mask.mask_mod, batch, queries, keys, states.device, mask).real()
        else:
            allowed = mask > BLOCKED if mask.is_floating_point() else mask != 0
            if mask.dim() > 2 and mask.shape[-2] == 1:  # of the keys alone
                allowed = allowed.flatten(1, -2)[:, 0, -tokens:]
            elif mask.dim() > 2:
                allowed = allowed.diagonal(mask.shape[-1] - mask.shape[-2], dim1=-2, dim2=-1)
                allowed = allowed.any(1) if mask.dim() == 4 else allowed
            real = allowed
        if real.shape[-1] != tokens:
            raise ValueError(
                f"The layer's attention mask, {tuple(mask.shape)}, is not about the {tokens} tokens that pass here, "
                "so padding cannot be told; leave these layers out with `layers=` or `submodel=`."
            )
        return real.expand(batch, -1)


class _Begin(SeamHook):
    """Forward pre-hook of self-attention."""

    def __init__(self, owner: Gate, state: LayerPass, attention: nn.Module) -> None:
        self.owner, self.state = owner, state
        names = list(inspect.signature(attention.forward).parameters)
        self.place = next((names.index(name) for name in MASKS if name in names), None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.state
        states = args[0] if args else kwargs.get("hidden_states")
        state.shape = states.shape if isinstance(states, torch.Tensor) else None
        state.mask = next((kwargs[name] for name in MASKS if name in kwargs), None)
        if state.mask is None and self.place is not None and self.place < len(args):
            state.mask = args[self.place]
        state.known = True


class _End(SeamHook):
    """Forward hook of the layer."""

    def __init__(self, owner: Gate, state: LayerPass) -> None:
        self.owner, self.state = owner, state

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.state.forget()


def share_pass(model: nn.Module, site: Site, gate: Gate) -> LayerPass:
    """What `gate` shares with the other gates of its patch in the layer of `site`; called by `Gate.attach`."""
    layer = layer_of(model, site)
    if layer is None:  # a pooling head: nothing is known of it but what passes
        return LayerPass()
    for hook in layer._forward_hooks.values():
        if isinstance(hook, _End) and hook.owner.patch.name == gate.patch.name:
            return hook.state
    state = LayerPass()
    layer.register_forward_hook(_End(gate, state))
    for inside in find_attention(layer):
        if not inside.cross:
            inside.module.register_forward_pre_hook(_Begin(gate, state, inside.module), with_kwargs=True)
    return state
