"""The FFN and residual seams: what enters or leaves one projection passes through the gates.

The gates stand in a child of the module that holds the projection, and a hook on the projection sends the tensor
through them. A projection that PEFT wraps, or unwraps, is followed before the next forward, so that the path through
the adapter is regularized as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base import Gate
from ..sites.layers import ProjectionSite
from .attention import SEAM, Seam
from .own_attention import SeamHook, disconnect


__all__ = ["ProjectionSeam", "connect_projection", "follow", "projection_key"]


class ProjectionSeam(Seam):
    """The gates at the input or the output (`point`) of the child `name` of the module that carries this."""

    def __init__(self, name: str, point: str) -> None:
        super().__init__()
        self.name, self.point = name, point

    def awake(self) -> bool:
        """Whether a gate may act on this call."""
        return self.training or any(gate.patch.in_eval for gate in self.children() if isinstance(gate, Gate))


class _SendInput(SeamHook):
    """Forward pre-hook of the projection."""

    def __init__(self, seam: ProjectionSeam) -> None:
        self.owner = seam

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (self.owner.send(args[0]), *args[1:]) if args and self.owner.awake() else None


class _SendOutput(SeamHook):
    """Forward hook of the projection."""

    def __init__(self, seam: ProjectionSeam) -> None:
        self.owner = seam

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.owner.awake():
            return None
        if isinstance(output, tuple):  # a mixture of experts may return the scores of its router as well
            return (self.owner.send(output[0]), *output[1:])
        return self.owner.send(output)


class _Follow(SeamHook):
    """Forward pre-hook of the module that holds `name`: moves `hook` when what stands there was replaced."""

    def __init__(self, name: str, hook: SeamHook, target: nn.Module) -> None:
        self.owner, self.name, self.hook, self.target = hook.owner, name, hook, target

    def __call__(self, module: nn.Module, args: Any) -> None:
        current = held(module, self.name)
        if current is not None and current is not self.target:
            self.move(current)

    @torch.compiler.disable  # never reached in a compiled forward: wrapping a model comes before compiling it
    def move(self, current: nn.Module) -> None:
        disconnect(self.target, [self.owner])
        _register(current, self.hook)
        self.target = current


def held(parent: nn.Module, name: str) -> nn.Module | None:
    """What `parent` holds under `name`, which may lead through a dict of modules (LoRA's `lora_B.default`)."""
    found: nn.Module | None = parent
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def _register(target: nn.Module, hook: Any) -> None:
    if isinstance(hook, _SendInput):
        target.register_forward_pre_hook(hook)
    else:
        target.register_forward_hook(hook)


def follow(parent: nn.Module, name: str, hook: SeamHook) -> None:
    """Leave the forward hook `hook` on the child `name` of `parent`, and on what replaces that later."""
    target = held(parent, name)
    assert target is not None
    _register(target, hook)
    parent.register_forward_pre_hook(_Follow(name, hook, target))


def projection_key(site: ProjectionSite) -> str:
    """Name of the seam of `site` in its parent; by number, since PEFT finds modules by the ends of their names."""
    numbers, inside = [], site.parent
    for part in site.name.split("."):
        numbers.append(str(list(inside._modules).index(part)))
        inside = inside._modules[part]  # type: ignore[assignment]
    return f"{SEAM}_{'_'.join(numbers)}_{site.point}"


def connect_projection(site: ProjectionSite, seam: ProjectionSeam) -> None:
    """Leave the hooks that send what passes `site` through `seam`."""
    follow(site.parent, site.name, _SendInput(seam) if seam.point == "input" else _SendOutput(seam))
