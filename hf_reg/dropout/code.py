"""What the code of a class does with its parts, read without running it."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from torch import nn

from ..sites.ffn import widths


__all__ = ["is_between", "is_used"]

PLATFORM = ("torch.", "transformers.modeling_utils", "transformers.generation", "transformers.utils")


class _Uses(ast.NodeVisitor):
    """The attributes of `self` in the order in which a method uses them; a called one after its arguments."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def visit_Call(self, node: ast.Call) -> None:
        own = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", None) == "self"
        for part in (*node.args, *node.keywords) if own else (node.func, *node.args, *node.keywords):
            self.visit(part)
        if own:
            self.names.append(node.func.attr)  # type: ignore[attr-defined]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        if isinstance(node.ctx, ast.Load) and getattr(node.value, "id", None) == "self":
            self.names.append(node.attr)


@functools.cache
def _methods(cls: type[nn.Module]) -> list[list[str]] | None:
    """What each method of `cls` but `__init__` uses of `self`, in order; None if a source cannot be read."""
    found = []
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        function = inspect.unwrap(member) if inspect.isfunction(member) else None
        if function is None or name == "__init__" or function.__module__.startswith(PLATFORM):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):
            return None
        uses = _Uses()
        uses.visit(tree)
        found.append(uses.names)
    return found


def is_used(owner: nn.Module, name: str) -> bool:
    methods = None if type(owner).__module__.startswith("torch.") else _methods(type(owner))  # type: ignore[arg-type]
    return methods is None or any(name in uses for uses in methods)


def is_between(owner: nn.Module, name: str, downs: set[nn.Module]) -> bool:
    """Whether `owner` uses `name` between its up- and its down-projection, and not after that as well."""
    linears = {key: child in downs for key, child in owner._modules.items() if child is not None and widths(child)}
    if not any(linears.values()):
        return False
    sequence = isinstance(owner, nn.Sequential)
    between = after = False
    for uses in [list(owner._modules)] if sequence else _methods(type(owner)) or []:  # type: ignore[arg-type]
        state = ""
        for use in uses:
            if use in linears:
                state = "down" if linears[use] else "up"
            between |= use == name and state == "up" and any(linears.get(u) for u in uses)
            after |= use == name and state == "down"
    return between and not after
