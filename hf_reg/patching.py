"""`patch_model`, `unpatch_model` and `patched`: attach regularizers to a model and take them off again."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .base import Gate, Patch
from .checkpoints.block import note_patches
from .names import nearest
from .own_attention import connect, disconnect
from .seams import SEAM, AttentionSeam, install
from .selection import select
from .sites import AttentionSite, find_attention, find_uncovered


__all__ = ["check_ran", "known_patches", "make_patch", "patch_model", "patched", "unpatch_model", "unwrap"]

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
    """Regularize the attention modules of `model`: active in training, invisible in evaluation, gone after
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
    sites = find_attention(inner)
    uncovered = find_uncovered(inner, sites)
    plan = [(one, _plan(inner, one, sites, uncovered)) for one in patches]  # everything that can fail, fails here

    for one, gates in plan:
        _warn_partial(one, gates, uncovered)  # before anything changes: a warning may be turned into an error

    install()
    _forget_compiled()
    for one, gates in plan:
        _attach(inner, one, gates)
    note_patches(inner)
    return model


def _plan(
    model: nn.Module, patch: Patch, sites: list[AttentionSite], uncovered: dict[str, int]
) -> list[tuple[AttentionSite, Gate]]:
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    accepted = [site for site in sites if patch.accepts(site)]
    if not accepted:
        if sites:
            reason = f"none of its {len(sites)} attention modules is {patch.acts_on}"
        elif uncovered:
            reason = "its token mixing has code of its own: " + ", ".join(
                f"{n} x {name}" for name, n in uncovered.items()
            )
        else:
            reason = "it has no attention module"
        raise ValueError(f"{patch.name} found nothing to patch in {kind!r}: {reason}.")
    chosen = select(model, patch, accepted)
    for site in chosen:
        patch.check(model, site)
    return [(site, patch.gate(site)) for site in chosen]


def _attach(model: nn.Module, patch: Patch, gates: list[tuple[AttentionSite, Gate]]) -> None:
    chosen = {site.module for site, _ in gates}
    _detach(model, patch.name, keep_seams=chosen)
    for site, gate in gates:
        seam = site.module._modules.get(SEAM)
        if seam is None:
            seam = AttentionSeam(site.kind, site.prefix)
            site.module.add_module(SEAM, seam)
            connect(site.module, seam, site.kind)
        reference = next(site.module.parameters(), None)
        if reference is not None and not reference.is_meta:  # of a layer that is offloaded: it runs elsewhere
            gate.to(reference.device)
        seam.add_module(patch.name, gate)
        seam.train(site.module.training)
        gate.attach(model, site)


def _detach(model: nn.Module, name: str | None, keep_seams: Collection[nn.Module] = ()) -> None:
    """Take the gates called `name` (None: all) off, with their hooks, and then the seams left empty."""
    modules = list(model.modules())
    removed: list[Any] = []
    for module in modules:
        seam = module._modules.get(SEAM)
        if seam is None:
            continue
        removed += [seam._modules.pop(key) for key in list(seam._modules) if name in (None, key)]
        if not seam._modules and module not in keep_seams:
            removed.append(module._modules.pop(SEAM))
            disconnect(module)
    for module in modules:
        if removed:
            disconnect(module, removed)


def _warn_partial(patch: Patch, gates: list[Any], uncovered: dict[str, int]) -> None:
    if uncovered and patch.submodel == "all":
        names = ", ".join(f"{count} x {name}" for name, count in uncovered.items())
        warnings.warn(
            f"{patch.name} reaches {len(gates)} attention modules, but not those with code of their own: {names}. "
            "They run unregularized; `print(describe(model))` shows what is covered.",
            UserWarning,
            stacklevel=3,
        )


def _forget_compiled() -> None:
    """Compiled code is not told that a module changed: drop it, so that the next call compiles again."""
    torch.compiler.reset()


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
    seams = [module for module in inner.modules() if SEAM in module._modules]
    present = sorted({name for module in seams for name in module._modules[SEAM]._modules})  # type: ignore[union-attr]
    if patch is not None and patch not in present:
        raise ValueError(f"{patch!r} is not on this model; it carries {', '.join(present) or 'no patch'}.")
    if seams:
        _forget_compiled()
        _detach(inner, patch)
        note_patches(inner)
    return model


@contextmanager
def patched(model: Model, patch: str | Patch | Sequence[str | Patch], **settings: Any) -> Iterator[Model]:
    """`patch_model` for a `with` block; the patches that were there before come back, also after an exception."""
    inner = unwrap(model)
    before = _snapshot(inner)
    patch_model(model, patch, **settings)
    try:
        yield model
    finally:
        unpatch_model(model)
        _restore(inner, before)
        note_patches(inner)


def _snapshot(model: nn.Module) -> list[tuple[nn.Module, AttentionSite, dict[str, Gate]]]:
    sites = {site.path: site for site in find_attention(model)}
    return [
        (module, sites[path], dict(module._modules[SEAM]._modules))
        for path, module in model.named_modules()
        if SEAM in module._modules
    ]


def _restore(model: nn.Module, snapshot: list[tuple[nn.Module, AttentionSite, dict[str, Gate]]]) -> None:
    by_patch: dict[str, list[tuple[AttentionSite, Gate]]] = {}
    for _, site, gates in snapshot:
        for name, gate in gates.items():
            by_patch.setdefault(name, []).append((site, gate))
    for found in by_patch.values():
        _attach(model, found[0][1].patch, found)


def check_ran(model: nn.Module) -> None:
    """After a training step: raise if no patched module ran its patch, warn by name if some did not.

    Raises:
        `RuntimeError`: if no attention module of the step went through its patch.
    """
    inner = unwrap(model)
    seams = {path: module._modules[SEAM] for path, module in inner.named_modules() if SEAM in module._modules}
    waiting = {path: seam for path, seam in seams.items() if seam.enabled()}
    silent = [path for path, seam in waiting.items() if not seam.ran]
    if not silent:
        return
    if len(silent) == len(waiting):
        raise RuntimeError(
            f"The model took a training step, but none of its {len(waiting)} patched attention modules ran their "
            f"patch (first: {silent[0]}). Its attention does not go through transformers' interface with these "
            "settings; unpatch it, or report the model type."
        )
    warnings.warn(
        f"{len(silent)} of {len(waiting)} patched attention modules did not run in this step: "
        f"{', '.join(silent[:5])}.",
        UserWarning,
        stacklevel=2,
    )
