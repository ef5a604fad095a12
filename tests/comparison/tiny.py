"""A tiny comparison in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.tiny_runs import arguments, write


def recipe(folder: Path, task: str = "sequence-classification", **compare: Any) -> Path:
    """Three methods, one size, two seeds, nothing tuned; `compare` changes that."""
    path = write(folder, task, adapter=None, patches=None, penalties=None, train=arguments(folder, task))
    tree = yaml.safe_load(path.read_text())
    given = {"methods": ["no_dropout", "hf_default", "tlm"], "sizes": [4], "seeds": 2, "tuning": "none"}
    tree["compare"] = given | {"cost_steps": 0, "processes": 1, "folder": str(folder / "results")} | compare
    path.write_text(yaml.safe_dump(tree))
    return path
