"""A failed call leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


__all__ = ["unchanged_on_failure"]


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Put back every module, parameter and buffer of `model`, and what is trained, if the body raises.

    Values are not copied: the body must not write into a parameter before it can no longer fail.
    """
    registries = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
    before = {
        module: (type(module), {name: dict(getattr(module, name)) for name in registries})
        for module in model.modules()
    }
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for module, (cls, kept) in before.items():
            module.__class__ = cls
            for name, entries in kept.items():
                registry = getattr(module, name)
                registry.clear()
                registry.update(entries)
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        raise
