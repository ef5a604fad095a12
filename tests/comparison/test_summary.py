"""`summary.json`, from synthetic cells."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from hf_reg.comparison.cells import Cell
from hf_reg.comparison.plan import read_plan
from hf_reg.comparison.result import Comparison
from hf_reg.comparison.summary import _at_the_end, summarize

from .tiny import recipe


def made(tmp_path: Path, missing: int = 0, **compare: Any) -> dict[str, Any]:
    """Eight seeds, two sizes; of the two other methods one is better by 0.1, and at size 8 only."""
    plan = read_plan(recipe(tmp_path, seeds=8, sizes=[4, 8], **compare))
    cells, records = [], {}
    for method in plan.methods:
        for size in (4, 8):
            for seed in range(8):
                accuracy = 0.5 + seed / 100 + (0.1 + seed / 1000 if method == "tlm" and size == 8 else 0)
                key = f"{method} {size} {seed}"
                cells.append(Cell(key, method, size, seed, {}))
                measures = {"train_loss": 0.1, "eval_loss": 1 - accuracy, "accuracy": accuracy, "extra": 1.0}
                records[key] = {"measures": measures | {"gap": 0.9 - accuracy, "ece": None, "drift": 0.0}}
    for key in list(records)[:missing]:
        del records[key]
    costs = [{"key": "c", "method": name, "ratio": 1.0, "low": 0.9, "high": 1.1, "steps": 3} for name in plan.methods]
    return summarize(
        plan, cells, records, costs, {"tlm": {"patches.tlm.rate": 0.2}}, ["s"], {"torch": "2"}, len(cells)
    )


def test_rows_are_of_one_size_and_measure(tmp_path: Path) -> None:
    found = made(tmp_path)
    assert found["sizes"] == [4, 8] and found["cells"] == 48 and found["missing"] == 0
    assert [one["name"] for one in found["measures"]] == ["accuracy", "eval_loss", "gap", "drift"]
    assert [one["higher_is_better"] for one in found["measures"]] == [True, False, False, False]
    assert found["metric"] == {"name": "accuracy", "higher_is_better": True} and len(found["rows"]) == 3 * 2 * 4
    assert found["keys"][-2:] == ["c", "s"] and len(found["keys"]) == 50
    told = Comparison(tmp_path, found)
    row = told.row("tlm", 8, "accuracy")
    assert row["n"] == 8 and abs(row["mean"] - mean(0.6 + seed / 100 + seed / 1000 for seed in range(8))) < 1e-12
    assert told.row("tlm", 8, "accuracy")["difference"]["verdict"] == "better"
    assert told.row("tlm", 8, "eval_loss")["difference"]["verdict"] == "better"
    assert told.row("tlm", 4, "accuracy")["difference"]["verdict"] == "no difference shown"
    assert abs(told.row("tlm", 4, "accuracy")["mean"] - mean(0.5 + seed / 100 for seed in range(8))) < 1e-12
    assert told.row("hf_default", 8, "accuracy")["difference"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    methods = {one["name"]: one for one in found["methods"]}
    assert methods["tlm"]["tuned"] == {"patches.tlm.rate": 0.2} and methods["no_dropout"]["tuned"] is None
    assert "better" in str(told) and "<pre>" in told._repr_html_()


def test_the_metric_that_is_asked_for(tmp_path: Path) -> None:
    found = made(tmp_path, metric="extra", lower_is_better=["extra"])
    assert found["metric"] == {"name": "extra", "higher_is_better": False}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    found = made(tmp_path, missing=3)
    assert found["missing"] == 3 and Comparison(tmp_path, found).row("no_dropout", 4, "accuracy")["n"] == 5
    assert any("With 5 seeds the test cannot show any difference between 3 methods" in note for note in found["notes"])
    none = made(tmp_path, missing=48)
    assert none["rows"] == [] and any("Nothing is compared" in note for note in none["notes"])
    assert "48 cells are missing" in str(Comparison(tmp_path, none))


def test_settings_at_the_end_of_their_range_are_told(tmp_path: Path) -> None:
    plan = read_plan(recipe(tmp_path, methods=["hf_default", "tlm", "balora"], tuning={"trials": 2}))
    found = {
        "hf_default": {"train.learning_rate": 0.0027},  # of 0.0025 to 0.04
        "tlm": {"train.learning_rate": 0.01, "patches.tlm.rate": 0.001},  # a rate cannot be below 0
        "balora": {"train.learning_rate": 0.39, "adapter.r": 8},
    }
    notes = _at_the_end(plan, found)
    assert len(notes) == 2 and notes[0].startswith("HF default: the best train.learning_rate found, 0.0027, is near")
    assert "0.0025 to 0.4. Widen compare.methods.balora.search." in notes[1]
    assert not _at_the_end(plan, {"hf_default": {"train.learning_rate": 0.0034}})
    assert _at_the_end(plan, {"tlm": {"patches.tlm.rate": 0.46}})
