"""The pages of examples/methods are those of the docstrings and of coverage.json."""

from __future__ import annotations

from .pages import FOLDER, pages


def test_pages_are_up_to_date() -> None:
    expected = pages()
    assert {path.name for path in FOLDER.iterdir()} == set(expected)
    for name, text in expected.items():
        assert (FOLDER / name).read_text() == text, f"{name}: run python -m tests.pages"
