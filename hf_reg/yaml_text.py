"""YAML as people write settings: `1e-4` is a number, `no` and `off` are words, and no key is given twice.

PyYAML follows YAML 1.1, where `1e-4` is a text, `save_strategy: no` is false and `12:30` is 750. These are the rules
of the core schema of YAML 1.2, on PyYAML's safe loader: plain values only, never objects.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


__all__ = ["dump_yaml", "load_yaml"]

PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "merge": r"<<",
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # those below, and none of YAML 1.1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            if isinstance(key.value, str) and key.value != "<<":
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would take for something else than text."""


for _name, _pattern in PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), None)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{PLAIN['float']})$"), None)


def load_yaml(text: str) -> Any:
    """The plain values that `text` writes down.

    Raises:
        `yaml.YAMLError`: for what is not YAML, is no plain value, or gives a key twice.
    """
    return yaml.load(text, Loader=_Loader)  # a safe loader


def dump_yaml(value: Any) -> str:
    """YAML that [`load_yaml`] reads back as `value`, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
