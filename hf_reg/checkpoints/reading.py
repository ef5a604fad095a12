"""Blocks of checkpoints that others wrote: names and plain values that are known, or a `ValueError` in words."""

from __future__ import annotations

import json
import math
import re
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from packaging.version import InvalidVersion, Version

from ..base import Patch, Penalty, check_range
from ..names import nearest, shown
from ..patching import known_patches, make_patch
from ..recipes import known_penalties, make_companions, make_penalties
from ..schedules import make_schedule
from .block import COMPANIONS, CUSTOM, KEYS


if TYPE_CHECKING:
    from ..optimizers import Companion

__all__ = ["LARGEST_BLOCK", "Recipe", "read_block"]

LARGEST_BLOCK = 1_000_000  # characters of JSON; ours have a few hundred


@dataclass(frozen=True)
class Recipe:
    """What an `hf_reg` block names.

    Attributes:
        version (`str`): of the hf_reg that wrote it.
        patches (`list[Patch]`): to attach again.
        penalties (`list[Penalty]`): of the training; those that are the user's own code are not among them.
        seed (`int`, *optional*): of the training.
        versions (`dict[str, str]`): of torch, transformers, peft and accelerate.
        companions (`list[Companion]`): what acted beside the optimizer; the user's own code is not among it.
    """

    version: str
    patches: list[Patch]
    penalties: list[Penalty]
    seed: int | None
    versions: dict[str, str]
    companions: list[Companion]


def _typed(value: Any, hint: Any) -> Any:
    """A value of JSON as one of the type `hint`; `TypeError` if it is none."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for one in inner:
            try:
                return _typed(value, one)
            except TypeError:
                continue
    elif origin in (tuple, list, Sequence) and isinstance(value, list):
        return [_typed(one, inner[0]) for one in value]
    elif origin is Mapping and isinstance(value, dict):
        whole = inner[0] is int and all(re.fullmatch(r"-?\d{1,6}", key) for key in value)
        if whole or inner[0] is str:
            return {int(key) if whole else key: _typed(one, inner[1]) for key, one in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    elif hint is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    elif hint in (bool, str, type(None)) and isinstance(value, hint):
        return value
    raise TypeError


def _settings(owner: str, method: type, settings: Any, leave: str = "") -> dict[str, Any]:
    """Settings of JSON, each of the type that the field of `method` has."""
    if not isinstance(settings, dict):
        raise ValueError(f"{owner} is {shown(settings)}; expected an object with its settings.")
    names = [f.name for f in fields(method) if f.init and f.name != leave]
    hints = get_type_hints(method)
    found = {}
    for name, value in settings.items():
        if name not in names:
            raise ValueError(
                f"{owner} has no setting {shown(name)}.{nearest(name, names)} Settings: {', '.join(names)}."
            )
        if name == "schedule" and value is not None:
            found[name] = make_schedule(value)
            continue
        try:
            found[name] = _typed(value, hints[name])
        except TypeError:
            raise ValueError(f"{owner}: {name}={shown(value)} is no value of the type {hints[name]}.") from None
    return found


def _read_patches(patches: Any) -> list[Patch]:
    if not isinstance(patches, dict):
        raise ValueError(f"patches is {shown(patches)}; expected an object of names.")
    known = known_patches()
    made = []
    for name, settings in patches.items():
        if name not in known:
            raise ValueError(f"unknown patch {shown(name)}.{nearest(name, list(known))} Known: {', '.join(known)}.")
        made.append(make_patch(name, **_settings(name, known[name], settings)))
    return made


def _read_penalties(penalties: Any) -> list[Penalty]:
    if not isinstance(penalties, dict):
        raise ValueError(f"penalties is {shown(penalties)}; expected an object of names.")
    known = known_penalties()
    made = []
    for name, settings in penalties.items():
        if not isinstance(settings, dict):
            raise ValueError(f"penalty {shown(name)} is {shown(settings)}; expected an object with its settings.")
        settings = dict(settings)
        method = settings.pop("method", name)
        if method == CUSTOM:
            check_range(shown(name), "weight", settings.pop("weight", None), 0, math.inf)
            if settings:
                raise ValueError(f"penalty {shown(name)} is the user's own, yet has {shown(sorted(settings))}.")
            continue
        if not isinstance(method, str) or method not in known:
            raise ValueError(f"unknown penalty {shown(method)}. Known: {', '.join(known)}.")
        checked = _settings(name, known[method], settings, leave="name")
        made += make_penalties({method: checked | {"name": name}})
    return made


def _read_companions(companions: Any) -> list[Companion]:
    if not isinstance(companions, dict):
        raise ValueError(f"{COMPANIONS} is {shown(companions)}; expected an object of names.")
    from ..optimizers import COMPANIONS as known

    made: list[Companion] = []
    for name, settings in companions.items():
        if settings == {"method": CUSTOM}:
            continue
        if name not in known:
            raise ValueError(f"unknown companion {shown(name)}. Known: {', '.join(known)}.")
        made += make_companions({name: _settings(name, known[name], settings)})
    return made


def _newer(block: Any) -> str:
    """A sentence about the version of hf_reg that wrote `block`, if this one is older."""
    from .. import __version__

    written = block.get("version") if isinstance(block, dict) else None
    try:
        newer = isinstance(written, str) and Version(written) > Version(__version__)
    except InvalidVersion:
        newer = False
    return f" hf_reg {shown(written)} wrote it, newer than this {__version__}: update hf_reg." if newer else ""


def _read(block: Any) -> Recipe:
    if not isinstance(block, dict):
        raise ValueError(f"it is {shown(block)}; expected an object with {', '.join(KEYS)}.")
    if (size := len(json.dumps(block))) > LARGEST_BLOCK:
        raise ValueError(f"it has {size:,} characters; at most {LARGEST_BLOCK:,} are read.")
    if further := sorted(set(block) - {*KEYS, COMPANIONS}):
        raise ValueError(f"it has further keys, {shown(further)}; expected {', '.join(KEYS)}.")
    if missing := [key for key in KEYS if key not in block]:
        raise ValueError(f"it lacks {', '.join(missing)}.")
    for key, hint in {"version": str, "seed": int | None, "versions": Mapping[str, str]}.items():
        try:
            _typed(block[key], hint)
        except TypeError:
            raise ValueError(f"{key} is {shown(block[key])}; expected {hint}.") from None
    patches, penalties = _read_patches(block["patches"]), _read_penalties(block["penalties"])
    companions = _read_companions(block.get(COMPANIONS, {}))
    return Recipe(block["version"], patches, penalties, block["seed"], dict(block["versions"]), companions)


def read_block(block: Any) -> Recipe:
    """The [`Recipe`] of an `hf_reg` block. Nothing that the block names is executed or imported.

    Raises:
        `ValueError`: for unknown names and settings, values of another type or out of range, or a block too large. It
            says so if a newer hf_reg wrote the block.
    """
    try:
        recipe = _read(block)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"The hf_reg block cannot be used: {error}{_newer(block)}") from error
    if newer := _newer(block):
        warnings.warn(f"The hf_reg block is understood, but{newer}", UserWarning, stacklevel=3)
    return recipe
