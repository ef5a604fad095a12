"""YAML as people write settings: `1e-4` is a number, `no` and `off` are words, and no key is given twice.

PyYAML follows YAML 1.1, where `1e-4` is a text, `save_strategy: no` is false and `12:30` is 750. These are the rules
of the core schema of YAML 1.2, on PyYAML's safe loader: plain values only, never objects, and no more of them than
are written down: an alias may stand for a value, but not for a value of values without end.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from .names import shown


__all__ = ["dump_yaml", "load_yaml"]

PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "merge": r"<<",
}
TAG = "tag:yaml.org,2002:"
KINDS = {"str": yaml.ScalarNode, "seq": yaml.SequenceNode, "map": yaml.MappingNode}
MOST = 100_000  # values, each alias counted as what it stands for; we chose it
DEEPEST = 100  # lists and sections inside of each other; we chose it
DIGITS = 100  # of a number; Python stops at 4300


def _refused(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check_scalar(node: yaml.ScalarNode) -> None:
    kind = node.tag.removeprefix(TAG)
    if kind in PLAIN and not re.fullmatch(PLAIN[kind], node.value):
        raise _refused(node, f"{shown(node.value)} is no {kind}")
    if kind in ("int", "float") and len(node.value) > DIGITS:
        raise _refused(node, f"a number of {len(node.value):,} digits")


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refused(key, "a key is a list or a section; expected text")
        if key.value in seen:
            raise _refused(key, f"the key {shown(key.value)} is given twice")
        if key.value != "<<":
            seen.add(key.value)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node stands for and how deep they are, once it is plain."""
    if id(node) in known:
        if (done := known[id(node)]) is None:
            raise _refused(node, "a value holds itself")
        return done
    known[id(node)] = None
    kind = node.tag.removeprefix(TAG)
    if not isinstance(node, KINDS.get(kind, yaml.ScalarNode)) or kind not in (*KINDS, *PLAIN):
        raise _refused(node, f"the tag {shown(node.tag.replace(TAG, '!!'))} makes no plain value of this")
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
        inside = [one for pair in node.value for one in pair]
    else:
        inside = node.value
    parts = [_measure(one, known) for one in inside]
    size, depth = 1 + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0)
    if size > MOST or depth > DEEPEST:
        found = f"{size:,} values" if size > MOST else f"{depth} values inside of each other"
        raise _refused(node, f"{found}, aliases included; at most {MOST if size > MOST else DEEPEST:,} are read")
    known[id(node)] = size, depth
    return size, depth


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # those below, and none of YAML 1.1

    def construct_document(self, node: yaml.Node) -> Any:
        _measure(node, {})
        return super().construct_document(node)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would take for something else than text."""


for _name, _pattern in PLAIN.items():
    _Loader.add_implicit_resolver(f"{TAG}{_name}", re.compile(f"^(?:{_pattern})$"), None)
_Dumper.add_implicit_resolver(f"{TAG}float", re.compile(f"^(?:{PLAIN['float']})$"), None)


def load_yaml(text: str) -> Any:
    """The plain values that `text` writes down.

    Raises:
        `yaml.YAMLError`: for what is not YAML, is no plain value, gives a key twice, or grows without end.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a safe loader
    except RecursionError:
        raise yaml.YAMLError(f"more than {DEEPEST} values inside of each other") from None


def dump_yaml(value: Any) -> str:
    """YAML that [`load_yaml`] reads back as `value`, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
