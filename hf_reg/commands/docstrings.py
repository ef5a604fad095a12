"""What a Google-style docstring says: summary, further paragraphs, and each argument."""

from __future__ import annotations

import inspect
import re
from typing import Any


__all__ = ["arguments", "body", "plain", "summary"]

SECTIONS = ("Args:", "Raises:", "Returns:", "Example:", "Attributes:", "Yields:")
ITEM = re.compile(r"^    (\w[\w, ]*?)(?: \((.*?)\))?: ?(.*)$")


def plain(text: str) -> str:
    """Without link marks: [`Patch`] and [`~hf_reg.base.Penalty`] become Patch and Penalty, emphasis its words."""
    text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\](?:\([^)]*\))?", r"\1", text)
    return re.sub(r"\*\*?(\S(?:[^*\n]*?\S)?)\*\*?(?=[\s.,;:)]|$)", r"\1", text)


def _lines(thing: Any) -> list[str]:
    return (inspect.cleandoc(getattr(thing, "__doc__", None) or "")).splitlines()


def summary(thing: Any) -> str:
    """The first paragraph, on one line."""
    return " ".join("\n".join(_lines(thing)).partition("\n\n")[0].split())


def body(thing: Any) -> list[str]:
    """The paragraphs after the first that belong to no section, each on a line; items of lists keep theirs."""
    kept: list[str] = []
    inside = False  # a section
    for block in "\n".join(_lines(thing)).split("\n\n")[1:]:
        first = block.partition("\n")[0]
        inside = first in SECTIONS or (inside and block.startswith((" ", "```")))
        if not inside and not block.startswith("```"):
            kept.append(plain(re.sub(r"\n(?!\s*- )\s*", " ", block)))
    return kept


def arguments(cls: Any) -> dict[str, str]:
    """What the docstrings of a function, or of a class and its bases, say of each argument; a "see ..." gives way to
    what is said there.

    Returns:
        `dict[str, str]`: by name.
    """
    said: dict[str, str] = {}
    for base in reversed(getattr(cls, "__mro__", (cls,))):
        for names, text in _items(base):
            for name in names.split(","):
                if name.strip() not in said or not text.startswith("see ["):
                    said[name.strip()] = text
    return {name: plain(text) for name, text in said.items()}


def _items(cls: Any) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    inside = False
    for line in _lines(cls) if "__doc__" in vars(cls) or not isinstance(cls, type) else ():
        if line and not line.startswith(" "):
            inside = line == "Args:"
        elif inside and (match := ITEM.match(line)):
            found.append((match[1], match[3]))
        elif inside and line.strip() and found:
            name, text = found[-1]
            found[-1] = name, f"{text} {line.strip()}".strip()
    return found
