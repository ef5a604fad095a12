"""The `hf_reg` block of a configuration: what regularized the model, in plain values."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedConfig

from ..base import Patch, Penalty
from ..schedules import Schedule
from ..seams.attention import gates


if TYPE_CHECKING:
    from ..optimizers import Companion

__all__ = ["BLOCK", "COMPANIONS", "CUSTOM", "KEYS", "block_of", "note_patches", "note_training"]

BLOCK = "hf_reg"  # the attribute of the configuration, and the key in config.json and hf_reg.json
KEYS = ("version", "patches", "penalties", "seed", "versions")
COMPANIONS = "companions"  # a further key, where there are any
CUSTOM = "custom"  # the method of a penalty that is no method of hf_reg: a function, a class of the user's own
BEFORE = "_hf_reg_before"  # on a patched model: the block that its configuration had, None for none
STACK = ("torch", "transformers", "peft", "accelerate")


@cache
def _stack() -> Mapping[str, str]:
    return {name: version(name) for name in STACK}


def _plain(value: Any) -> Any:
    """`value` as JSON holds it; `TypeError` for tensors, functions and other objects."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Schedule):
        own: tuple[Any, ...] = fields(value) if is_dataclass(value) else ()
        return {type(value).__name__: {f.name: _plain(getattr(value, f.name)) for f in own}}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    raise TypeError(f"{type(value).__name__} is no plain value.")


def _plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are plain; the others (the tensors of EWC) are left out."""
    found = {}
    for name, value in settings.items():
        try:
            found[name] = _plain(value)
        except TypeError:
            continue
    return found


def _of_patch(patch: Patch) -> dict[str, Any]:
    made = {f.name for f in fields(patch) if not f.init}
    return _plain_settings({name: value for name, value in patch.settings().items() if name not in made})


def _of_penalty(penalty: Penalty) -> dict[str, Any]:
    from ..recipes import known_penalties

    if known_penalties().get(penalty.NAME) is not type(penalty):
        return {"method": CUSTOM, "weight": penalty.weight}
    settings = _plain_settings({f.name: getattr(penalty, f.name) for f in fields(penalty) if f.init})
    return settings if settings.pop("name") == penalty.NAME else {"method": penalty.NAME} | settings


def _of_companion(companion: Any) -> dict[str, Any]:
    from ..optimizers import COMPANIONS as known

    if known.get(companion.NAME) is not type(companion):
        return {"method": CUSTOM}
    return _plain_settings({f.name: getattr(companion, f.name) for f in fields(companion) if f.init})


def _patches_on(model: nn.Module) -> dict[str, Any]:
    return {patch.name: _of_patch(patch) for patch in {gate.patch.name: gate.patch for gate in gates(model)}.values()}


def _block(
    patches: Mapping[str, Any], penalties: Mapping[str, Any], seed: int | None, companions: Any = None
) -> dict[str, Any]:
    from .. import __version__

    values = (__version__, dict(patches), dict(penalties), seed, dict(_stack()))
    further = {COMPANIONS: companions} if companions else {}
    return dict(zip(KEYS, values, strict=True)) | further


def block_of(model: nn.Module) -> dict[str, Any] | None:
    """The block of the model's configuration, or None."""
    block = getattr(getattr(model, "config", None), BLOCK, None)
    return block if isinstance(block, dict) else None


def _put(model: Any, block: dict[str, Any] | None) -> None:
    if block is not None:
        setattr(model.config, BLOCK, block)
    elif hasattr(model.config, BLOCK):
        delattr(model.config, BLOCK)


def note_patches(model: nn.Module) -> None:
    """Bring the block of `model` up to date with the patches that it carries.

    The penalties, companions and the seed that a block names already stay. Without patches the configuration gets
    back the block that it had before the first one, or none. Models that share one configuration object share its
    block.
    """
    if any(gates(model)) and isinstance(getattr(model, "config", None), PreTrainedConfig):
        vars(model).setdefault(BEFORE, copy.deepcopy(getattr(model.config, BLOCK, None)))
    for owner in [module for module in model.modules() if BEFORE in vars(module)]:
        if patches := _patches_on(owner):
            block = block_of(owner) or {}
            penalties, companions = block.get("penalties"), block.get(COMPANIONS)
            terms = penalties if isinstance(penalties, dict) else {}
            _put(owner, _block(patches, terms, block.get("seed"), companions))
        else:
            _put(owner, vars(owner).pop(BEFORE))


def note_training(
    model: nn.Module, penalties: Sequence[Penalty], seed: int, companions: Sequence[Companion] = ()
) -> None:
    """Name penalties, companions and the seed of a run in the block of `model`; a run without regularization leaves
    none.

    Args:
        model (`nn.Module`): of transformers or PEFT; one without a configuration of transformers is left as it is.
        penalties (sequence of [`Penalty`]): those of the user; what an adapter brings is among its own settings.
        seed (`int`): of the run.
        companions (sequence of [`~hf_reg.optimizers.Companion`], *optional*): those of the user.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    patches = _patches_on(model)
    if not (patches or penalties or companions) or not isinstance(getattr(model, "config", None), PreTrainedConfig):
        return
    terms = {penalty.name: _of_penalty(penalty) for penalty in penalties}
    beside = {one.NAME or type(one).__name__: _of_companion(one) for one in companions}
    if (terms or beside) and BEFORE in vars(model):
        vars(model)[BEFORE] = _block({}, terms, seed, beside)  # stays when the patches go
    _put(model, _block(patches, terms, seed, beside))
