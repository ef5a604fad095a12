"""The notebooks run from top to bottom, and are kept without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from .distributed.launch import ROOT


BOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
SLOW = ("02_adapters", "04_compare")
FIGURES = {"01_patch_model": 3, "02_adapters": 2, "03_rpo": 2, "04_compare": 2}


def outputs(book: Any, kind: str) -> list[Any]:
    shown = [one for cell in book.cells if cell.cell_type == "code" for one in cell.outputs]
    return [one["data"][kind] for one in shown if kind in one.get("data", {})]


def test_they_are_all_known() -> None:
    assert [path.stem for path in BOOKS] == list(FIGURES)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.slow if path.stem in SLOW else ()) for path in BOOKS],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    assert len(outputs(book, "image/png")) == FIGURES[path.stem]
    tables = outputs(book, "text/html")
    assert len(tables) == len(set(tables)) or path.stem == "04_compare"  # each is shown once
    assert not any(one.get("output_type") == "error" for cell in book.cells for one in cell.get("outputs", ()))
