"""`describe`: what is patched, in a terminal and in a notebook."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from rich.table import Table
from torch import nn

from .attaching import snapshot
from .base import Gate, Patch
from .patching import unwrap
from .seams.attention import gates
from .sites.attention import AttentionSite
from .sites.finding import SEAMS, find_sites
from .sites.layers import DropoutSite, ProjectionSite, Site
from .tables import Shown


__all__ = ["Description", "Row", "describe"]


@dataclass(frozen=True)
class Row:
    """One method in one sub-model."""

    method: str
    settings: str
    submodel: str
    patched: int
    found: int
    backend: str
    now: str
    notes: str


@dataclass(frozen=True)
class Description(Shown):
    """What `describe` found. `print` it for a table; a notebook shows it as HTML.

    Args:
        model (`str`): class and model type.
        rows (`list[Row]`): a row per method and sub-model.
        uncovered (`dict[str, int]`): token-mixing modules that no patch can reach, by class.
    """

    model: str
    rows: list[Row]
    found: int
    uncovered: dict[str, int]

    def _table(self) -> Table:
        table = Table(title=self.model, title_justify="left", caption=self._caption(), caption_justify="left")
        for name in ("method", "settings", "sub-model", "patched / found", "backend", "now", "notes"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            counts = f"{row.patched} / {row.found}"
            table.add_row(row.method, row.settings, row.submodel, counts, row.backend, row.now, row.notes)
        return table

    def _caption(self) -> str:
        lines = [] if self.rows else [f"No patch. {self.found} attention modules can be patched."]
        if self.uncovered:
            names = ", ".join(f"{count} x {name}" for name, count in self.uncovered.items())
            lines.append(f"Out of reach, runs unregularized: {names}.")
        return "\n".join(lines)


def _settings(patch: Patch) -> str:
    """The settings that differ from the defaults, and the rate."""
    shown = []
    defaults = {f.name: f.default for f in fields(patch)}
    for name, value in patch.settings().items():
        if name == patch.rate_field or value != defaults[name]:
            shown.append(f"{name}={value!r}")
    return ", ".join(shown)


def _reached(site: Site) -> str:
    """How a place is reached: by which attention backend, or where."""
    if isinstance(site, AttentionSite):
        return str(site.implementation) if site.kind == "interface" else f"own code ({site.kind})"
    if isinstance(site, DropoutSite):
        return f"{site.kind} ({site.how})"
    return f"{site.kind} ({site.point})" if isinstance(site, ProjectionSite) else ""


def _now(gate: Gate) -> str:
    rates = [part.p * part.factor for part in gate.rates()]
    if not rates:
        return "always on"
    rate = ", ".join(f"{rate:g}" for rate in rates)
    if gate.patch.in_eval:
        return f"{rate}, in evaluation too"
    return f"{rate} in training" if gate.training else f"off (eval); {rate} in training"


def describe(model: Any) -> Shown:
    """Which methods are on `model`, with which settings, on how many of the attention modules of each sub-model.

    Args:
        model (`nn.Module`): any transformers model, patched or not, in any wrapper. An [`RPOConfig`] or
            [`RPOTrainer`] is described by the formula of its loss.

    Returns:
        [`Description`]: `print` it, or leave it to the notebook.
    """
    own = None if isinstance(model, nn.Module) else getattr(model, "description", None)
    if isinstance(own, Shown):
        return own
    return _of_model(model)


def _of_model(model: nn.Module) -> Description:
    inner = unwrap(model)
    used = {gate.patch.seam for gate in gates(inner)} | {"attention"}
    places = {name: find_sites(inner, name) for name in SEAMS if name in used}
    groups: dict[tuple[str, str], list[tuple[Any, Gate]]] = {}
    for seam, sites in places.items():
        for name, members in snapshot(inner, sites).items():
            for site, gate in members:
                if gate.patch.seam == seam:
                    groups.setdefault((name, site.submodel), []).append((site, gate))
    rows = []
    for (name, submodel), members in groups.items():
        site, gate = members[0]
        found = [
            other for other in places[gate.patch.seam] if other.submodel == submodel and gate.patch.accepts(other)
        ]
        backends = sorted({_reached(member) for member, _ in members})
        notes = sorted({text for _, member in members if (text := member.notes())})
        rows.append(
            Row(
                name, _settings(gate.patch), f"{submodel or 'model'} ({site.submodel_class})", len(members),
                len(found), ", ".join(backends), _now(gate), "; ".join(notes),
            )
        )  # fmt: skip
    kind = getattr(getattr(inner, "config", None), "model_type", None)
    title = f"{type(inner).__name__} ({kind})" if kind else type(inner).__name__
    uncovered: dict[str, int] = {}
    for name, sites in places.items():
        uncovered |= SEAMS[name].uncovered(inner, sites)
    return Description(title, rows, len(places["attention"]), uncovered)
