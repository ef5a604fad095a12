"""Regularizers as users write them down: names, dicts, YAML and objects, made into `Patch` and `Penalty` objects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from .base import Patch, Penalty
from .names import nearest
from .patching import make_patch
from .yaml_text import load_yaml


if TYPE_CHECKING:
    from .optimizers import Companion

__all__ = ["FunctionPenalty", "known_penalties", "make_companions", "make_patches", "make_penalties", "read_recipe"]


@dataclass(eq=False)
class FunctionPenalty(Penalty):
    """A penalty from a bare function `function(model, inputs, outputs) -> scalar tensor`."""

    function: Callable[[nn.Module, Mapping[str, Any], Any], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise TypeError(f"{self.name}: expected a function(model, inputs, outputs), got {self.function!r}.")
        try:
            inspect.signature(self.function).bind(None, None, None)
        except TypeError as error:
            raise TypeError(f"{self.name}: the function must take (model, inputs, outputs): {error}.") from error
        except ValueError:  # a builtin without a signature
            return

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        assert self.function is not None
        return self.function(model, inputs, outputs)


@cache
def known_penalties() -> dict[str, type[Penalty]]:
    """Every penalty by name: ours, and those of other packages in the entry-point group `hf_reg.penalties`."""
    from .penalties import PENALTIES

    known = dict(PENALTIES)
    for entry in entry_points(group="hf_reg.penalties"):
        known.setdefault(entry.name, entry.load())
    return known


def read_recipe(text: Any) -> Any:
    """A string as YAML (or the YAML file that it names); anything else as it is."""
    if not isinstance(text, str):
        return text
    if text.endswith((".yaml", ".yml")):
        if not Path(text).is_file():
            raise ValueError(f"The file {text!r} is not there; give a YAML file, YAML text or a name.")
        text = Path(text).read_text()
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"Not a name and not YAML: {text!r} ({error}).") from error


def make_patches(spec: Any) -> list[Patch]:
    """`Patch` objects from a name, an object, a list of them, `{name: settings}` or YAML of one of these."""
    spec = read_recipe(spec)
    if spec is None:
        return []
    if isinstance(spec, (str, Patch)):
        return [make_patch(spec)]
    if isinstance(spec, Mapping):
        for name, settings in spec.items():
            if settings is not None and not isinstance(settings, Mapping):
                raise TypeError(f"{name}: expected a dict of settings, got {settings!r}.")
        return [make_patch(name, **(settings or {})) for name, settings in spec.items()]
    if isinstance(spec, Sequence):
        return [patch for one in spec for patch in make_patches(one)]
    raise TypeError(f"patches: expected a name, a Patch, a list or a dict, got {type(spec).__name__}.")


def make_companions(spec: Any) -> list[Companion]:
    """[`~hf_reg.optimizers.Companion`] objects from a name, an object, a list of them, `{name: settings}` or YAML.

    Raises:
        `ValueError`: for an unknown name, or the same companion twice.
        `TypeError`: for an unknown setting or a value that is none of these.
    """
    from .optimizers import COMPANIONS, Companion

    def made(spec: Any) -> list[Companion]:
        if isinstance(spec, Companion):
            return [spec]
        if isinstance(spec, str):
            spec = {spec: None}
        if isinstance(spec, Mapping):
            return [one(name, settings or {}) for name, settings in spec.items()]
        if isinstance(spec, Sequence):
            return [companion for part in spec for companion in made(part)]
        raise TypeError(f"companions: expected a name, a Companion, a list or a dict, got {type(spec).__name__}.")

    def one(name: str, settings: Any) -> Companion:
        if name not in COMPANIONS:
            raise ValueError(f"Unknown companion {name!r}.{nearest(name, list(COMPANIONS))} Known: "
                             f"{', '.join(COMPANIONS)}.")  # fmt: skip
        if not isinstance(settings, Mapping):
            raise TypeError(f"{name}: expected a dict of settings, got {settings!r}.")
        cls: Any = COMPANIONS[name]
        names = [f.name for f in fields(cls)]
        if unknown := next((key for key in settings if key not in names), None):
            raise TypeError(f"{name} has no setting {unknown!r}.{nearest(unknown, names)} Settings: "
                            f"{', '.join(names)}.")  # fmt: skip
        return cls(**settings)

    spec = read_recipe(spec)
    found = [] if spec is None else made(spec)
    names = [companion.NAME for companion in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"companions: {twice!r} is given twice. Keep one.")
    return found


def _penalty(name: str, value: Any) -> Penalty:
    if isinstance(value, Penalty):
        value.name = name
        return value
    if callable(value):
        return FunctionPenalty(name=name, function=value)
    if isinstance(value, (tuple, list)) and len(value) == 2 and callable(value[1]):
        return FunctionPenalty(name=name, weight=value[0], function=value[1])
    known = known_penalties()
    if name not in known:
        raise ValueError(f"Unknown penalty {name!r}.{nearest(name, list(known))} Known: {', '.join(known)}.")
    settings = {"weight": value} if isinstance(value, (int, float)) else value
    if settings is None:
        settings = {}
    if not isinstance(settings, Mapping):
        raise TypeError(f"{name}: expected a weight, a dict of settings or (weight, function), got {value!r}.")
    names = [f.name for f in fields(known[name]) if f.init]
    for setting in settings:
        if setting not in names:
            raise TypeError(
                f"{name} has no setting {setting!r}.{nearest(setting, names)} Settings: {', '.join(names)}."
            )
    return known[name](**settings)


def make_penalties(spec: Any) -> list[Penalty]:
    """`Penalty` objects from a name, an object, a list of them, a dict, or YAML of one of these.

    A dict may hold `{name: weight}`, `{name: settings}`, and for the user's own `{name: function}` or
    `{name: (weight, function)}`.

    Raises:
        `ValueError`: for an unknown name, or two penalties of one name.
        `TypeError`: for an unknown setting or a value that is none of these.
    """
    spec = read_recipe(spec)
    if spec is None:
        made: list[Penalty] = []
    elif isinstance(spec, str):
        made = [_penalty(spec, None)]
    elif isinstance(spec, Penalty):
        made = [spec]
    elif isinstance(spec, Mapping):
        made = [_penalty(name, value) for name, value in spec.items()]
    elif isinstance(spec, Sequence):
        made = [penalty for one in spec for penalty in make_penalties(one)]
    elif callable(spec):
        made = [FunctionPenalty(name=getattr(spec, "__name__", ""), function=spec)]
    else:
        raise TypeError(f"penalties: expected a name, a Penalty, a list or a dict, got {type(spec).__name__}.")
    names = [penalty.name for penalty in made]
    twice = sorted({name for name in names if names.count(name) > 1 or name == "task"})
    if twice:
        raise ValueError(f"Penalties need names of their own, other than 'task'; found {twice} twice or reserved.")
    return made
