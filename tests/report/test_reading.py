"""A folder is read as it is, and refused where its parts do not belong together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_reg.report import difference_plot, learning_curves, read_results, step_costs

from .folders import write_folder, write_lines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "comparison", sizes=(25, 100), seeds=3)


def change(path: Path, edit: Callable[[Any], None]) -> None:
    """Edit summary.json, or the list of the lines of a file of JSON lines."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        edit(rows)
        write_lines(path, rows)


def test_what_is_there_is_read(folder: Path) -> None:
    found = read_results(folder)
    assert found.methods[0] == found.reference == "hf_default" and len(found.cells) == 2 * 3 * 5
    assert list(found.measures)[0] == "accuracy" and found.sizes == [25, 100]
    assert [cell["seed"] for cell in found.cells_of("tlm", 25)] == [0, 1, 2]
    assert read_results(found) is found


def test_a_torn_last_line_does_not_count(folder: Path) -> None:
    with (folder / "cells.jsonl").open("a") as file:
        file.write('{"schema": 1, "method": "tlm", "si')
    assert len(read_results(folder).cells) == 30


def test_a_line_that_was_cut_is_named(folder: Path) -> None:
    lines = (folder / "cells.jsonl").read_text().splitlines(keepends=True)
    lines[4] = lines[4][:50] + "\n"
    (folder / "cells.jsonl").write_text("".join(lines))
    with pytest.raises(
        ValueError, match=r"cells.jsonl: line 5 is no line of a .*Remove that line.* Run `hf-reg compare`"
    ):
        read_results(folder)


def test_a_line_that_is_gone_is_noticed(folder: Path) -> None:
    change(folder / "cells.jsonl", lambda rows: rows.pop())
    with pytest.raises(
        ValueError, match="does not belong to.*accuracy of 'drophead' at size 100 has 3 cells, .* has 2"
    ):
        read_results(folder)


def test_a_cell_that_changed_is_noticed(folder: Path) -> None:
    change(folder / "cells.jsonl", lambda rows: rows[3]["measures"].update(accuracy=0.123))
    with pytest.raises(ValueError, match="accuracy of 'tlm' at size 25 has a mean of .*, the cells have"):
        read_results(folder)


def test_of_a_cell_computed_twice_the_last_counts(folder: Path) -> None:
    def again(rows: list[dict[str, Any]]) -> None:
        rows.insert(0, {**rows[3], "measures": {**rows[3]["measures"], "accuracy": 0.0}})
        rows.append({**rows[3], "seed": 77})  # of an earlier recipe

    change(folder / "cells.jsonl", again)
    assert len(read_results(folder).cells) == 30


REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "schema": ("summary.json", lambda s: s.update(schema=2), "schema 2; this version of hf_reg reads schema 1"),
    "key": ("summary.json", lambda s: s.pop("rows"), "has no 'rows'; it has 'schema', 'task'"),
    "reference": ("summary.json", lambda s: s.update(reference="x"), "the reference 'x' is none of its methods"),
    "metric": ("summary.json", lambda s: s.update(metric={"name": "f1"}), "the metric 'f1' is none of its measures"),
    "sizes": ("summary.json", lambda s: s.update(sizes=[], rows=[]), "names no size"),
    "verdict": (
        "summary.json", lambda s: s["rows"][1]["difference"].update(verdict="great"),
        "'great'; expected one of 'better'",
    ),
    "cell": ("cells.jsonl", lambda rows: rows[2].pop("measures"), "line 3 has no 'measures'"),
    "trial": ("trials.jsonl", lambda rows: rows[0].update(schema=None), "trials.jsonl: line 1 has schema None"),
    "interval": ("summary.json", lambda s: s["rows"][0].update(low=0.99), "an interval from 0.99 to 0."),
    "cost": ("costs.jsonl", lambda rows: rows[0].update(ratio=3.0), "ratio 3.0 with quartiles from 0.98 to 1.03"),
    "list": ("costs.jsonl", lambda rows: rows.__setitem__(0, [1]), "line 1 is no line of a comparison"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(folder: Path, case: str) -> None:
    name, edit, message = REFUSED[case]
    change(folder / name, edit)
    with pytest.raises(ValueError, match=message):
        read_results(folder)


@pytest.mark.parametrize("name", ["cells.jsonl", "summary.json"])
def test_other_folders(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}: expected the folder that `hf-reg compare` wrote"):
        learning_curves(folder)


def lines_of(figure: Any) -> dict[str, Any]:
    """Label to (line, caps, bars) of the error bars of the first plot."""
    return {bar.get_label(): bar for bar in figure.axes[0].containers}


def test_learning_curves_are_the_rows(folder: Path) -> None:
    results = read_results(folder)
    for measure in results.measures:
        drawn = lines_of(learning_curves(folder, measure))
        assert list(drawn) == [results.labels[method] for method in results.methods]
        for method in results.methods:
            rows = [results.rows[method, size, measure] for size in (25, 100)]
            line, _, (bars,) = drawn[results.labels[method]]
            assert list(line.get_ydata()) == [row["mean"] for row in rows]
            assert line.get_xdata() == pytest.approx([25, 100], rel=0.35)
            ends = [(low, high) for (_, low), (_, high) in bars.get_segments()]
            for row, end in zip(rows, ends, strict=True):
                assert end == pytest.approx((row["low"], row["high"]))
    with pytest.raises(ValueError, match="No measure 'acuracy'. Did you mean 'accuracy'"):
        learning_curves(folder, "acuracy")


def test_differences_are_the_rows(folder: Path) -> None:
    results = read_results(folder)
    figure = difference_plot(folder)
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == [results.labels[method] for method in results.methods[1:]]
    filled = {"better": "^", "worse": "v", "no difference shown": "o"}
    for axes, size in zip(figure.axes, (25, 100), strict=True):
        assert axes.get_title() == f"{size} examples"
        drawn = {bar.get_label(): bar for bar in axes.containers}
        assert list(drawn) == results.methods[1:]
        for method, (line, _, (bars,)) in drawn.items():
            one = results.rows[method, size, "accuracy"]["difference"]
            assert list(line.get_xdata()) == [one["mean"]] and line.get_marker() == filled[one["verdict"]]
            ((low, _), (high, _)) = bars.get_segments()[0]
            assert (low, high) == pytest.approx((one["low"], one["high"]))
    verdicts = {
        results.rows[m, s, "accuracy"]["difference"]["verdict"] for m in results.methods[1:] for s in (25, 100)
    }
    assert len(verdicts) > 1  # or the markers were not compared


def test_step_costs_are_the_lines(folder: Path) -> None:
    drawn = lines_of(step_costs(folder))
    for line in read_results(folder).costs:
        assert list(drawn[line["method"]][0].get_xdata()) == [line["ratio"]]
    (folder / "costs.jsonl").unlink()
    with pytest.raises(ValueError, match="no step cost"):
        step_costs(folder)
