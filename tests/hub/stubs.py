"""In place of verification and model cards, which have tests of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


calls: list[tuple[str, Path, Any, dict[str, Any]]] = []


def verify_checkpoint(path: Path, model: Any = None) -> SimpleNamespace:
    calls.append(("verify", Path(path), model, {}))
    return SimpleNamespace(passed=True, problems=[])


def write_card(folder: Path, source: Any = None, **facts: Any) -> Path:
    """As that of hf_reg.cards: keeps the text that is there."""
    calls.append(("card", Path(folder), source, facts))
    path = Path(folder) / "README.md"
    text = path.read_text() if path.exists() else "---\nlibrary_name: transformers\n---\n"
    path.write_text(text if "# Card" in text else f"{text}\n# Card\n")
    return path


def check_metadata(text: str) -> list[str]:
    return []


def modules() -> dict[str, ModuleType]:
    checkpoints, cards = ModuleType("hf_reg.checkpoints"), ModuleType("hf_reg.cards")
    vars(checkpoints).update(verify_checkpoint=verify_checkpoint)
    vars(cards).update(write_card=write_card, check_metadata=check_metadata)
    return {module.__name__: module for module in (checkpoints, cards)}


def install() -> None:
    sys.modules.update(modules())
