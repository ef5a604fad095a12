"""Sections of a recipe: frozen dataclasses, read from plain values whose keys and types are checked."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..names import nearest, shown
from .errors import RecipeError


__all__ = ["Section", "check_keys", "check_value", "read_section"]

WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
MANY = 20  # as many keys are still read in an error

S = TypeVar("S", bound="Section")


@dataclass(frozen=True)
class Section:
    """Base of sections. `SHORT` is the field that a bare text stands for."""

    SHORT: ClassVar[str | None] = None

    def check(self, where: str) -> None:
        """Raise [`RecipeError`] for what can be seen to be wrong without loading anything."""


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint in (Any, object):
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return type(value) in {type(choice) for choice in parts}  # whoever takes it knows which
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, (int,) if hint is int else (int, float)) and not isinstance(value, bool)
    if (origin or hint) in (list, tuple):
        return isinstance(value, list) and (not parts or all(_fits(one, parts[0]) for one in value))
    if (origin or hint) is dict:
        return isinstance(value, Mapping) and (len(parts) < 2 or all(_fits(one, parts[1]) for one in value.values()))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in {member.value for member in hint}
    return isinstance(hint, type) and isinstance(value, hint)


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        named = dict.fromkeys(_words(p) for p in parts if not (isinstance(p, type) and issubclass(p, Enum)))
        return " or ".join(named)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if (origin or hint) in (list, tuple):
        return "a list"
    if (origin or hint) is dict:
        return f"a section of keys, each with {_words(parts[1])}" if len(parts) > 1 else "a section of keys"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def check_value(value: Any, hint: Any, where: str) -> None:
    """Raise [`RecipeError`] unless `value` is of the type `hint`."""
    if not _fits(value, hint):
        found = "null" if value is None else f"{shown(value)} ({_words(type(value))})"
        raise RecipeError(f"{where}: expected {_words(hint)}, found {found}.")


def check_keys(given: Any, known: Collection[str], where: str) -> None:
    """Raise [`RecipeError`] unless `given` is a section whose keys are all known."""
    if not isinstance(given, Mapping):
        keys = f" ({', '.join(known)})" if len(known) <= MANY else ""
        raise RecipeError(f"{where or 'recipe'}: expected a section of keys{keys}, found {shown(given)}.")
    for key in given:
        if key not in known:
            listed = f" Known keys: {', '.join(known)}." if len(known) <= MANY else ""
            raise RecipeError(f"{_below(where, key)}: unknown key.{nearest(key, list(known))}{listed}")


def _below(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _section_of(hint: Any) -> type[Section] | None:
    """The section in `Model`, `Model | None` or `list[Model]`."""
    for part in (hint, *get_args(hint)):
        if is_dataclass(part) and isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def read_section(cls: type[S], given: Any, where: str = "") -> S:
    """A section from plain values.

    Raises:
        [`RecipeError`]: for unknown and missing keys, values of another type, and whatever `check` of the section
            finds.
    """
    if cls.SHORT and isinstance(given, str):
        given = {cls.SHORT: given}
    check_keys(given, [one.name for one in fields(cls)], where)
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for one in fields(cls):
        place, hint = _below(where, one.name), hints[one.name]
        if one.name not in given:
            if one.default is MISSING and one.default_factory is MISSING:
                raise RecipeError(f"{place}: missing. {one.metadata['help']}")
            continue
        value, inner = given[one.name], _section_of(hint)
        if inner is not None and get_origin(hint) is list:
            check_value(value, list, place)
            values[one.name] = [read_section(inner, part, f"{place}[{i}]") for i, part in enumerate(value)]
        elif inner is not None and not (value is None and type(None) in get_args(hint)):
            values[one.name] = read_section(inner, value, place)
        else:
            check_value(value, hint, place)
            values[one.name] = value
    made = cls(**values)
    made.check(where)
    return made
