"""The dropout seam: gates at one dropout of a model, the last of which sets its rate.

Where the place is a module, that module rests (`p` = 0) and the gate drops in its stead, at the rate of a buffer, so
that `torch.compile` need not compile again when a schedule moves it. Attention through transformers' interface gets
the rate as an argument. Any other number is written where the model's forward reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..base import Patch, RateGate, check_range
from ..sites.layers import DropoutSite
from .attention import SEAM, Seam
from .dropped import QuickDropout
from .own_attention import SeamHook


__all__ = ["Dial", "DropoutSeam", "PlaceGate", "connect_dropout", "dropout_key", "refuse_flex"]


class Dial:
    """The rate of one place: its own one (`own`) passed through its gates, and what is written for it there."""

    def __init__(self, owner: nn.Module, attribute: str, how: str) -> None:
        self.owner, self.attribute, self.how = owner, attribute, how
        self.own = getattr(owner, attribute)
        self.gates: list[PlaceGate] = []

    def turn(self) -> None:
        """Bring the gates and the place up to date."""
        rate = float(self.own)
        for gate in self.gates:
            rate = gate.settle(rate, acts=gate is self.gates[-1])
        if not self.gates:
            written = self.own
        elif self.how == "module":
            written = 0.0
        else:  # of an interface the rate without the schedule: a constant of compiled code
            written = self.gates[-1].p if self.how == "interface" else rate
        setattr(self.owner, self.attribute, written)


class PlaceGate(RateGate):
    """Sets the rate of one dropout of the model, or moves it by a schedule.

    Args:
        patch ([`Patch`]): `p` None keeps the rate that the place has.
        how (`str`): of the [`DropoutSite`].
    """

    dial: Dial | None = None
    follows = False  # whether `p` is the rate of the place
    acts = True  # the last gate at its place

    def __init__(self, patch: Patch, how: str) -> None:
        super().__init__(patch)
        self.how = how

    @property
    def p(self) -> float:
        return self._p

    @p.setter
    def p(self, value: float | None) -> None:
        if value is not None:
            check_range(self.patch.name, "p", value, 0, 1, closed=True)
            self._p = float(value)
        self.follows = value is None
        self._refresh()

    def _refresh(self) -> None:
        if self.dial is None:
            super()._refresh()
        else:
            self.dial.turn()

    def settle(self, rate: float, *, acts: bool) -> float:
        """The rate after this gate, given that before it."""
        self._p, self.acts = (rate if self.follows else self._p), acts
        super()._refresh()
        return min(self._p * self._factor, 1.0)

    def attach(self, model: nn.Module, site: Any) -> None:
        seam = site.module.get_submodule(dropout_key(site))
        found = [gate.dial for gate in seam.children() if isinstance(gate, PlaceGate) and gate.dial is not None]
        dial = found[0] if found else Dial(site.owner, site.attribute, site.how)
        dial.gates.append(self)
        self.dial = dial
        dial.turn()

    def detach(self, model: nn.Module) -> None:
        dial, self.dial = self.dial, None
        if dial is not None:
            dial.gates.remove(self)
            dial.turn()

    def enabled(self) -> bool:
        return self.training and self.acts and (self.active or self.how == "interface") and self.how != "gate"

    def transform(self, states: torch.Tensor) -> torch.Tensor:
        return self.drop(states) if self.how == "module" else states

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Attention with the rate in force, unless another gate (TLM's) has taken dropout away."""

        def attend(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            if not kwargs.get("dropout"):
                return function(module, query, key, value, mask, **kwargs)
            if self.patch.schedule is None or not torch.compiler.is_compiling():
                given = kwargs | {"dropout": min(self._p * self._factor, 1.0)}
                quick = query.device.type == "cpu" and not torch.compiler.is_compiling()
                with QuickDropout() if quick else nullcontext():
                    return function(module, query, key, value, mask, **given)
            return self._attend(function, module, query, key, value, mask, kwargs)

        return attend

    def _attend(
        self, function: Callable[..., Any], module: nn.Module, query: Any, key: Any, value: Any, mask: Any, kwargs: Any
    ) -> Any:
        """The same with the rate of the buffer: attention is linear in its values, so that of the unit vectors is
        its probabilities, whatever mask, bias or sink the function knows of."""
        units = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(*key.shape[:2], -1, -1)
        weights, _ = function(module, query, key, units, mask, **kwargs | {"dropout": 0.0})
        dropped = self.drop(weights.transpose(1, 2))
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (dropped @ values).transpose(1, 2).contiguous(), dropped

    def notes(self) -> str:
        if self.how == "number" and self.patch.schedule is not None:
            return "torch.compile compiles again for every rate of its schedule"
        return ""


class DropoutSeam(Seam):
    """The gates of one dropout. Those of an interface stand in the seam of its attention module instead."""


class _Send(SeamHook):
    """Forward hook of a dropout module, which rests."""

    def __init__(self, seam: DropoutSeam) -> None:
        self.owner = seam

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.owner.send(output) if self.owner.training else None


class _Notice(SeamHook):
    """Forward pre-hook of a module that reads a number."""

    def __init__(self, seam: DropoutSeam) -> None:
        self.owner = seam

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            for gate in self.owner.enabled():
                gate.ran = True


def dropout_key(site: DropoutSite) -> str:
    """Name of the seam of `site` in its module, which may hold several numbers."""
    return f"{SEAM}_{site.attribute}" if site.how == "number" else SEAM


def refuse_flex(name: str, site: DropoutSite) -> None:
    """Raise `ValueError` for an attention module whose backend knows no dropout."""
    if site.kind == "attention" and getattr(site.attention, "implementation", None) == "flex_attention":
        raise ValueError(
            f"{name}: flex_attention has no dropout ({site.path}). Load the model with attn_implementation='sdpa' or "
            "'eager', or drop hidden units."
        )


def connect_dropout(site: DropoutSite, seam: DropoutSeam) -> None:
    """Leave the hooks that `seam` needs; before those of TLM, which puts back what dropout took (`own_attention`)."""
    if site.how == "module":
        site.module.register_forward_hook(_Send(seam), prepend=True)
    elif site.how == "number":
        site.module.register_forward_pre_hook(_Notice(seam))
