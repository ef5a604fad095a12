"""Samples are stratified, grow, and share nothing with what they are measured on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from hf_reg.comparison.cells import grid_of, setting_of_all
from hf_reg.comparison.plan import read_plan
from hf_reg.comparison.samples import Samples, draw_order
from hf_reg.runs.errors import RunError

from .tiny import recipe


def test_every_beginning_is_stratified() -> None:
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    for seed in range(5):
        order = draw_order(labels, 100, seed)
        assert sorted(order) == list(range(100))
        for size in range(3, 101):
            counts = Counter(labels[row] for row in order[:size])
            for label, share in {"a": 0.6, "b": 0.3, "c": 0.1}.items():
                assert counts[label] >= 1 and abs(counts[label] - share * size) < 2, (seed, size, counts)
    assert draw_order(labels, 100, 0) != draw_order(labels, 100, 1)
    assert draw_order(None, 9, 3) == draw_order(None, 9, 3) != list(range(9))


def rows(folder: Path, count: int) -> None:
    texts = [{"text": f"text number {i}", "label": "ab"[i % 2]} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))


def test_sizes_validation_and_probes(tmp_path: Path) -> None:
    path = recipe(tmp_path, sizes=[4, 0.5], tuning={"trials": 1, "validation": 0.25})
    rows(tmp_path, 40)
    found = Samples.load(read_plan(path))
    assert len(found.validation) == 10 and len(found.pool) == 30 and found.count(0.5) == 15
    small, large = set(found.sample(4, 0)["text"]), set(found.sample(15, 0)["text"])
    assert small < large and not large & set(found.validation["text"])
    assert set(found.sample(15, 1)["text"]) != large
    assert len(found.probes) == 40 and set(found.probes) == set(found.held_out["text"])
    assert found.sample(4, 0).features["label"].names == ["a", "b"]
    with pytest.raises(RunError, match=r"31 examples of 30 to train on \(10 rows are kept for the search\)"):
        found.count(31)


def test_probes_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one\ntwo\n\nthree\n")
    found = Samples.load(read_plan(recipe(tmp_path, probe={"file": str(tmp_path / "notes.txt"), "rows": 10})))
    assert sorted(found.probes) == ["one", "three", "two"]


def test_small_samples_know_every_tag(tmp_path: Path) -> None:
    found = Samples.load(read_plan(recipe(tmp_path, "token-classification", sizes=[1])))
    assert found.sample(1, 0).features["tags"].feature.names == ["long", "short"]


def test_a_key_is_that_of_all_that_determines_the_numbers(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    rows(tmp_path, 12)

    def keys(*changes: str) -> list[str]:
        plan = read_plan(path, changes)
        settings = {name: plan.settings(name) for name in plan.methods}
        return [cell.key for cell in grid_of(plan, Samples.load(plan), setting_of_all(plan), settings)]

    first = keys()
    assert keys() == first and len(set(first)) == len(first) == 6
    assert keys("compare.seeds=[0]") == first[:3] and keys("compare.processes=2", "train.output_dir=x") == first
    changes = [
        "train.max_steps=5",
        "data.max_tokens=31",
        "compare.threads=2",
        "compare.evaluate_every=3",
        "compare.sizes=[6]",
    ]
    for change in (
        *changes,
        "compare.tuning={trials: 1, validation: 2}",
        f"compare.probe={{file: {tmp_path}/rows.jsonl, rows: 3}}",
    ):
        assert not set(keys(change)) & set(first), change
    changed = keys("compare.methods={no_dropout: null, hf_default: null, tlm: {patches: {tlm: {rate: 0.3}}}}")
    assert [a == b for a, b in zip(changed, first, strict=True)] == [True, True, False] * 2
    (tmp_path / "base" / "note.txt").write_text("another model")
    assert not set(keys()) & set(first)
    (tmp_path / "base" / "note.txt").unlink()
    rows(tmp_path, 14)
    assert not set(keys()) & set(first)
