"""`hf-reg methods`: every method by name; one of them in full."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from inspect import signature
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..costs import Cost, costs
from ..names import nearest
from ..runs.errors import UseError
from ..tables import Shown
from .catalogue import CATALOGUE, Entry, entry_of
from .docstrings import arguments, body, plain, summary


__all__ = ["TITLES", "Method", "find_method", "known_methods", "methods_table"]

TITLES = {
    "patch": "patches", "penalty": "penalties", "companion": "companions of the optimizer", "adapter": "adapters",
    "loss": "task losses", "preset": "presets", "rpo variant": "variants of RPO",
}  # fmt: skip


@dataclass(frozen=True)
class Method(Shown):
    """One method.

    Args:
        name (`str`): as a recipe or `patch_model` takes it.
        kind (`str`): `"patch"`, `"penalty"`, `"companion"`, `"adapter"`, `"loss"`, `"preset"` or `"rpo variant"`.
        description (`str`): one sentence.
        settings (`dict`): names and defaults.
        said (`dict`): what is said of each setting: its meaning, and where the default comes from.
        notes (`list[str]`): further paragraphs, such as where it deviates from the authors' code.
        entry ([`Entry`], *optional*): of the catalogue; `None` for methods of other packages.
    """

    name: str
    kind: str
    description: str
    settings: dict[str, Any]
    said: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    entry: Entry | None = None

    def in_short(self) -> dict[str, Any]:
        """As in the list of all."""
        return {key: getattr(self, key) for key in ("name", "kind", "description", "settings")}

    def as_json(self) -> dict[str, Any]:
        """All that there is to say of it, as plain values."""
        settings = {
            name: {"default": value, "meaning": self.said.get(name, "")} for name, value in self.settings.items()
        }
        conditions, measured = self._costs()
        given = {"definition": self.entry.definition, "paper": self.entry.paper} if self.entry else {}
        example = {"example": self.entry.example} if self.entry else {}
        cost = {"measured": [one._asdict() for one in measured], "conditions": conditions if measured else None}
        return {**self.in_short(), "settings": settings, "notes": self.notes, **given, **example, "cost": cost}

    def _costs(self) -> tuple[str, list[Cost]]:
        conditions, rows = costs()
        wanted = self.entry.measured if self.entry else ()
        return conditions, [one for one in rows if (one.section, one.ours) in wanted]

    def _table(self) -> RenderableType:
        parts: list[RenderableType] = [Text(f"{self.name} ({self.kind})", style="bold"), Text(plain(self.description))]
        if self.entry:
            facts = Table.grid(padding=(0, 2))
            for name in ("definition", "paper", "example"):
                facts.add_row(name, Text(getattr(self.entry, name)))
            parts += [Text(), facts]
        parts += [part for note in self.notes for part in (Text(), Text(note))]
        table = _plain_table("setting", "default", "what it is, and where the default comes from")
        for name, value in self.settings.items():
            table.add_row(name, Text(repr(value)), Text(self.said.get(name, "")))
        parts += [Text(), table] if self.settings else []
        conditions, measured = self._costs()
        if measured:
            cost = _plain_table("measured", "of", "compared with", "ratio")
            for one in measured:
                cost.add_row(one.case, one.ours, one.peer, f"{one.ratio:.3f}")
            parts += [cost, Text(conditions)]
        else:
            parts += [Text("Its cost has not been measured.")]
        return Group(*parts)


def _plain_table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def _defaults(cls: Any) -> dict[str, Any]:
    """The settings of a class and their defaults, those of the method itself first."""
    own = [f for f in fields(cls) if f.init and not f.kw_only]
    return {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default
        for f in (*own, *(f for f in fields(cls) if f.init and f.kw_only))
    }


def _method(name: str, kind: str, cls: Any, settings: dict[str, Any]) -> Method:
    entry = entry_of(name, cls) if kind in ("patch", "companion") else CATALOGUE.get(name)
    return Method(name, kind, summary(cls), settings, arguments(cls), body(cls), entry)


def _adapters() -> list[Method]:
    from ..adapters import BALoraConfig, SorsaConfig

    found = []
    for name, cls in {"sorsa": SorsaConfig, "balora": BALoraConfig}.items():
        ours = {key for base in cls.__mro__ if base.__module__.startswith("hf_reg.") for key in base.__annotations__}
        settings = {key: value for key, value in _defaults(cls).items() if key in ours}
        found.append(_method(name, "adapter", cls, settings))
    return found


def _beside_the_optimizer() -> list[Method]:
    from ..optimizers import COMPANIONS, StableMaxLoss, strong_weight_decay

    found = [_method(name, "companion", cls, _defaults(cls)) for name, cls in COMPANIONS.items()]
    made: tuple[tuple[str, str, Any], ...] = (
        ("stablemax", "loss", StableMaxLoss), ("strong_weight_decay", "preset", strong_weight_decay)
    )  # fmt: skip
    for name, kind, thing in made:
        keywords = [one for one in signature(thing).parameters.values() if one.kind is one.KEYWORD_ONLY]
        found.append(_method(name, kind, thing, {one.name: one.default for one in keywords}))
    return found


def _variants() -> list[Method]:
    from ..losses.rpo import DEFAULTS, FORMULAS, rpo_loss

    found = []
    for variant, formula in FORMULAS.items():
        entry, (beta, eta) = CATALOGUE[f"rpo-{variant}"], DEFAULTS[variant]
        written = f"{formula}, L_pref = mean_b( -log sigmoid(beta h) ), {entry.definition}"
        said = {"variant": "of RPOConfig, or of train in a recipe", "beta": "as published", "eta": "0 is DPO"}
        found.append(
            Method(
                f"rpo-{variant}", "rpo variant", summary(rpo_loss),
                {"variant": variant, "beta": beta, "eta": eta}, said, body(rpo_loss),
                Entry(written, entry.paper, entry.example),
            )
        )  # fmt: skip
    return found


def known_methods() -> list[Method]:
    """Every method, those of other packages included."""
    from ..patching import known_patches
    from ..recipes import known_penalties

    patches = [_method(name, "patch", cls, _defaults(cls)) for name, cls in known_patches().items()]
    penalties = []
    for name, penalty in known_penalties().items():
        settings = {key: value for key, value in _defaults(penalty).items() if key != "name"}
        penalties.append(_method(name, "penalty", penalty, settings))
    return [*patches, *penalties, *_beside_the_optimizer(), *_adapters(), *_variants()]


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        [`UseError`]: naming the nearest one.
    """
    known = {method.name: method for method in known_methods()}
    if name not in known:
        raise UseError(f"{name!r} is no method.{nearest(name, list(known))} Known: {', '.join(known)}.")
    return known[name]


def methods_table() -> RenderableType:
    """A table for each kind of method."""
    found, parts = known_methods(), []
    for kind, title in TITLES.items():
        table = _plain_table("name", "what it does", "settings and defaults")
        table.title, table.title_justify, table.title_style = title, "left", "bold"
        for one in found:
            if one.kind == kind:
                settings = ", ".join(f"{key}={value!r}" for key, value in one.settings.items())
                table.add_row(one.name, Text(plain(one.description)), Text(settings))
        parts.append(table)
    return Group(*parts)
