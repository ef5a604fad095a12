"""What acted in the steps since the last log: each patch, the model's own dropout, and training mode itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..attaching import seam_at
from ..base import Gate
from ..dropout.finding import find_dropouts
from ..messages import say
from ..seams.attention import gates
from ..seams.dropout import PlaceGate
from ..sites.layers import DropoutSite
from .terms import Terms


__all__ = ["MODE", "Activity"]

MODE = "training_mode"  # the share of steps at whose end the model was in training mode; logged where it is below 1


class Activity:
    """Logs `ran_<patch>` (share of its modules where it acted), `rate_<patch>` (mean rate in force), and of the
    model's own dropouts `dropout_rate` (mean rate) and `dropout_on` (share of those with a rate above 0 that were in
    training mode).

    Modes and rates are those at the end of a step, before the optimizer moves. A `forward` that was compiled does not
    tell whether a patch acted: then there is no `ran_<patch>`.

    Args:
        model (`nn.Module`): unwrapped, with its patches.
        compiled (`bool`): whether its forward is, or may be.
    """

    def __init__(self, model: nn.Module, compiled: bool) -> None:
        self.model, self.compiled = model, compiled
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._warned = False
        self._places, self._gates = list(_places(model)), list(gates(model))

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] = self._counts.get(name, 0) + 1

    def note(self) -> None:
        """A step has been taken."""
        self._add(MODE, float(self.model.training))
        if not self.model.training and not self._warned:
            self._warned = True
            say(
                "The model is in evaluation mode at a training step: dropout, patches and penalties do nothing. "
                "Something calls model.eval() after the trainer called model.train()."
            )
        rates: dict[str, list[float]] = {}
        for gate in self._gates:
            rates.setdefault(gate.patch.name, []).extend(part.p * part.factor for part in gate.rates())
        for name, found in rates.items():
            if found:
                self._add(f"rate_{name}", sum(found) / len(found))
        if self._places:
            now = [(_rate(place), place[0].training) for place in self._places]
            self._add("dropout_rate", sum(rate for rate, _ in now) / len(now))
            on = [training for rate, training in now if rate > 0]
            if on:
                self._add("dropout_on", sum(on) / len(on))

    def read(self, device: torch.device) -> Terms:
        """The means since the last time."""
        found = Terms()
        for name, total in self._sums.items():
            found.add(name, torch.tensor(total / self._counts[name], device=device))
        acted: dict[str, list[bool]] = {}
        for gate in self._gates:
            if not self.compiled and not (isinstance(gate, PlaceGate) and (gate.how == "gate" or not gate.acts)):
                acted.setdefault(gate.patch.name, []).append(gate.ran)  # those left out act through another gate
            gate.ran = False
        for name, ran in acted.items():
            found.add(f"ran_{name}", torch.tensor(sum(ran) / len(ran), device=device))
        self._sums, self._counts = {}, {}
        return found


Found = tuple[nn.Module, Any, str, DropoutSite | None]  # what has the mode, what has the rate and where, the site


def _places(model: nn.Module) -> Iterator[Found]:
    """The dropouts of the model itself, of its heads and adapters: not those of patches."""
    known = set()
    for site in find_dropouts(model):
        if isinstance(site, DropoutSite) and site.how != "gate":
            known.add(site.owner)
            yield site.module, site.owner, site.attribute, site
    for module in model.modules():
        if isinstance(module, _DropoutNd) and not isinstance(module, Gate) and module not in known:
            yield module, module, "p", None


def _rate(place: Found) -> float:
    """The rate in force; a place with a gate rests, and the gate drops in its stead."""
    _, owner, attribute, site = place
    seam = seam_at(site) if site is not None else None
    standing = [gate for gate in seam.children() if isinstance(gate, PlaceGate) and gate.acts] if seam else []
    return sum(gate.p * gate.factor for gate in standing) if standing else float(getattr(owner, attribute))
