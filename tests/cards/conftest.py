"""Each kind of training once, for all tests of cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .runs import RUNS


@pytest.fixture(scope="session")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = {name: run(tmp_path_factory.mktemp(name)) for name, run in RUNS.items()}
    for trainer in made.values():
        trainer.save_model()
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"
