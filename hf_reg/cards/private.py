"""What must never stand on a card: tokens, paths of a machine, the name of who is logged in."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id


__all__ = ["LEFT_OUT", "is_private", "public", "repo_id_or_none", "secrets_in"]

TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|(?:sk-|gh[pousr]_|github_pat_)[A-Za-z0-9_-]{16,})")
PATH = re.compile(r"(?<![\w/:.)>\]-])(?:/[\w.@+-]+){2,}|(?<![\w`])~\w*/\w|\b[A-Za-z]:[\\/](?!/)|\bfile://|\\\\\w")
NOBODY = {"root", "user", "users", "home", "admin", "runner", "ubuntu", "nobody", "jovyan", "build", "model", "test"}
LEFT_OUT = "(local, left out)"


def secrets_in(text: str) -> list[str]:
    """Tokens and absolute paths in `text`; of a token the first letters only."""
    tokens = [f"the token {found[:6]}..." for found in TOKEN.findall(text)]
    return tokens + [f"the path {found!r}" for found in PATH.findall(text)]


def _people() -> set[str]:
    """Names of who is logged in, as far as they say anything."""
    names = {os.environ.get("USER", ""), os.environ.get("LOGNAME", ""), Path("~").expanduser().name}
    try:
        names.add(getpass.getuser())
    except (KeyError, OSError):  # a user without a name, as in some containers
        pass
    return {name for name in names if len(name) > 2 and name.lower() not in NOBODY}


def is_private(text: str) -> bool:
    """Whether `text` is, or holds, something that is nobody else's business."""
    if secrets_in(text) or text.startswith(("/", "~", "\\")):
        return True
    return any(re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", text) for name in _people())


def public(value: Any) -> str:
    """A setting as Python would read it, or [`LEFT_OUT`]."""
    if isinstance(value, torch.Tensor) or (
        isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())
    ):
        return "(tensors)"
    if callable(value) and hasattr(value, "__qualname__"):
        return "(a function)"
    value = getattr(value, "value", value)  # of an enum
    text = repr(sorted(value, key=str)) if isinstance(value, (set, frozenset)) else repr(value)
    return LEFT_OUT if is_private(text.strip("'\"")) or is_private(text) or " at 0x" in text else text


def repo_id_or_none(name: Any, *, revision: str | None = None) -> str | None:
    """`name` if it can only be that of a repository: well-formed, no folder here, and "OWNER/NAME" or of a revision
    that came from the Hub."""
    if not isinstance(name, str) or not name or TOKEN.search(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if not Path(name).exists() and ("/" in name or revision) else None
