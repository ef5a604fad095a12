"""The cards in model_cards/ are what their facts render to, and the facts are of the kind that the examples give."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_reg.cards import Facts, check_metadata

from .reference import CARDS, REFERENCES, record, render


@pytest.mark.parametrize("name", REFERENCES)
def test_rendered_again(name: str) -> None:
    kept = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert render(name) == kept, "run `python -m tests.cards` and look at what changed"
    assert check_metadata(kept) == []


def test_every_card_has_a_reference() -> None:
    assert (
        {path.stem for path in CARDS.glob("*.json")} == {path.stem for path in CARDS.glob("*.md")} == set(REFERENCES)
    )


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in REFERENCES if name != "bert-tlm"]


@pytest.mark.parametrize("name", ["bert-tlm", *SLOW])
def test_the_examples_give_such_facts(name: str, tmp_path: Path) -> None:
    kept, new = Facts.from_json((CARDS / f"{name}.json").read_text(encoding="utf-8")), record(name, tmp_path)
    assert new.methods == kept.methods and new.training == kept.training and new.seeds == kept.seeds
    assert new.results.keys() == kept.results.keys() and new.final.keys() == kept.final.keys()
    assert new.baseline.keys() == kept.baseline.keys() and new.versions.keys() == kept.versions.keys()
