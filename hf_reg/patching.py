"""`patch_model`, `unpatch_model` and `patched`: attach regularizers to a model and take them off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .attaching import Gates, attach, detach, forget_compiled, restore, snapshot
from .base import Patch
from .checkpoints.block import note_patches
from .names import nearest
from .seams.attention import gates
from .sites.finding import SEAMS, find_sites
from .sites.selection import select


__all__ = ["known_patches", "make_patch", "patch_model", "patched", "unpatch_model", "unwrap"]

Model = TypeVar("Model", bound=nn.Module)


@cache
def known_patches() -> dict[str, type[Patch]]:
    """Every method by name: ours, and those that other packages register in the entry-point group `hf_reg.patches`."""
    from .patches import PATCHES

    known = dict(PATCHES)
    for entry in entry_points(group="hf_reg.patches"):
        known.setdefault(entry.name, entry.load())
    return known


def make_patch(patch: str | Patch, **settings: Any) -> Patch:
    """A [`Patch`] from its name and settings.

    Raises:
        `ValueError`: for an unknown name or a setting out of range.
        `TypeError`: for an unknown setting, or no name at all.
    """
    if isinstance(patch, Patch):
        if settings:
            raise TypeError(
                f"Settings {sorted(settings)} beside a {type(patch).__name__} object: put them into the object."
            )
        return patch
    if not isinstance(patch, str):
        raise TypeError(f"A patch is a name or a Patch object, got {type(patch).__name__}: {patch!r}.")
    known = known_patches()
    if patch not in known:
        raise ValueError(f"Unknown patch {patch!r}.{nearest(patch, list(known))} Known: {', '.join(known)}.")
    names = [f.name for f in fields(known[patch])]
    for name in settings:
        if name not in names:
            raise TypeError(f"{patch} has no setting {name!r}.{nearest(name, names)} Settings: {', '.join(names)}.")
    return known[patch](**settings)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside `torch.compile`, DDP, FSDP and PEFT wrappers.

    Raises:
        `TypeError`: if it is no module.
        `ValueError`: inside `DataParallel`, whose replicas would all draw from one stream.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a model (torch.nn.Module), got {type(model).__name__}.")
    while True:
        if isinstance(model, DataParallel):
            raise ValueError(
                "The model is inside torch.nn.DataParallel, whose threads copy it in every step. Patch `model.module` "
                "before wrapping it, or better use DistributedDataParallel (`torchrun` or `accelerate launch`)."
            )
        if isinstance(model, (DistributedDataParallel, FullyShardedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def patch_model(model: Model, patch: str | Patch | Sequence[str | Patch], **settings: Any) -> Model:
    """Regularize the attention modules or FFNs of `model`: active in training, invisible in evaluation, gone after
    `unpatch_model`.

    The model is changed in place: no module, forward or configuration is replaced. Checkpoints stay stock; the
    `hf_reg` attribute of the configuration names the patches there, and goes with them. A method that is already on
    the model gets the new settings, on the modules that they select.

    Args:
        model (`nn.Module`): a transformers model, or one inside PEFT, DDP, FSDP or `torch.compile`.
        patch (`str`, [`Patch`] or a sequence of them): what to attach, by name (paper defaults) or as an object.
        settings: settings of the method, when `patch` is one name.

    Returns:
        The same object.

    Raises:
        `ValueError`: unknown name, setting out of range, nothing to patch, an unfit backend or wrapper.
        `TypeError`: unknown setting. In every case the model is as it was.

    Example:

    ```python
    model = patch_model(model, "tlm")
    model = patch_model(model, DropHead(p=0.2, layers="6:"))
    ```
    """
    if isinstance(patch, (str, Patch)) or not isinstance(patch, Sequence):
        patches = [make_patch(patch, **settings)]
    else:
        if settings:
            raise TypeError(f"Settings {sorted(settings)} with several patches: give each its own, as Patch objects.")
        patches = [make_patch(one) for one in patch]
        if not patches:
            raise ValueError(f"No patch given. Known: {', '.join(known_patches())}.")
    names = [one.name for one in patches]
    if len(set(names)) < len(names):
        raise ValueError(f"The same patch twice: {', '.join(names)}. Name each once.")

    inner = unwrap(model)
    _refuse_replacing(model, [one for one in patches if one.replaces_parameters])
    found = {}
    for name in {one.seam for one in patches}:
        sites = find_sites(inner, name)
        found[name] = sites, SEAMS[name].uncovered(inner, sites)
    plan = [(one, _plan(inner, one, *found[one.seam])) for one in patches]  # everything that can fail, fails here

    for one, chosen in plan:
        _warn_partial(one, chosen, found[one.seam][1])  # before anything changes: a warning may become an error
        if said := one.warning([site for site, _ in chosen]):
            warnings.warn(f"{one.name}: {said}", UserWarning, stacklevel=2)

    forget_compiled()
    for one, chosen in plan:
        attach(inner, one.name, chosen)
    note_patches(inner)
    return model


def _refuse_replacing(model: nn.Module, patches: Sequence[Patch]) -> None:
    """Patches that put parameters in place of others, where these are held already, or two of them at once."""
    if len(patches) > 1:
        raise ValueError(
            f"{' and '.join(one.name for one in patches)} both train other tensors in place of weights: choose one."
        )
    for module in model.modules() if patches else ():
        if isinstance(module, (DistributedDataParallel, FullyShardedDataParallel)):
            raise ValueError(
                f"{patches[0].name} replaces parameters that {type(module).__name__} holds already. Patch the model "
                "first, then wrap it and make the optimizer (RegularizedTrainer does)."
            )


def _plan(model: nn.Module, patch: Patch, sites: list[Any], uncovered: dict[str, int]) -> Gates:
    noun = SEAMS[patch.seam].noun
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    accepted = [site for site in sites if patch.accepts(site)]
    if not accepted:
        if sites:
            reason = f"none of its {len(sites)} {SEAMS[patch.seam].nouns} is {patch.acts_on}"
        elif uncovered:
            reason = f"{SEAMS[patch.seam].lacking}: " + ", ".join(f"{n} x {name}" for name, n in uncovered.items())
        else:
            reason = f"it has no {noun}"
        raise ValueError(f"{patch.name} found nothing to patch in {kind!r}: {reason}.")
    chosen = select(model, patch, accepted, noun)
    for site in chosen:
        patch.check(model, site)
    return [(site, patch.gate(site)) for site in chosen]


def _warn_partial(patch: Patch, chosen: list[Any], uncovered: dict[str, int]) -> None:
    if uncovered and patch.submodel == "all":
        names = ", ".join(f"{count} x {name}" for name, count in uncovered.items())
        warnings.warn(
            f"{patch.name} reaches {len(chosen)} {SEAMS[patch.seam].nouns}, but not those with code of their own: "
            f"{names}. They run unregularized; `print(describe(model))` shows what is covered.",
            UserWarning,
            stacklevel=3,
        )


def unpatch_model(model: Model, patch: str | None = None) -> Model:
    """Take one method, or all of them, off `model`; afterwards it computes what it did before `patch_model`.

    Args:
        model (`nn.Module`): a patched model, in any wrapper.
        patch (`str`, *optional*): the method to remove; None removes all. A model that carries none is left as it is.

    Returns:
        The same object.

    Raises:
        `ValueError`: if `patch` names a method that is not on the model.
    """
    inner = unwrap(model)
    present = sorted({gate.patch.name for gate in gates(inner)})
    if patch is not None and patch not in present:
        raise ValueError(f"{patch!r} is not on this model; it carries {', '.join(present) or 'no patch'}.")
    if present:
        forget_compiled()
        detach(inner, patch)
        note_patches(inner)
    return model


@contextmanager
def patched(model: Model, patch: str | Patch | Sequence[str | Patch], **settings: Any) -> Iterator[Model]:
    """`patch_model` for a `with` block; the patches that were there before come back, also after an exception."""
    inner = unwrap(model)
    before = snapshot(inner, [site for name in SEAMS for site in find_sites(inner, name)] if any(gates(inner)) else [])
    patch_model(model, patch, **settings)
    try:
        yield model
    finally:
        unpatch_model(model)
        restore(inner, before)
        note_patches(inner)
