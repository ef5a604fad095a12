"""The report says what the lines beside it say, loads nothing, and opens in a browser without a complaint."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_reg.report import read_results, wording, write_report, writing

from .folders import METHODS, write_folder
from .test_reading import change


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = (
    """<script>alert("x")</script><img src=https://example.org/x onerror=alert(1)>|`'$x^$ [a](https://b) --> _*"""
)


class Page(HTMLParser):
    """What a page says and loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def images(self) -> dict[str, bytes]:
        """The pictures by alternative text."""
        return {
            str(attrs["alt"]): base64.b64decode(str(attrs["src"]).removeprefix("data:image/svg+xml;base64,"))
            for tag, attrs in self.tags
            if tag == "img"
        }


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("comparison"))
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def folder(reported: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(reported, tmp_path / "copy")


REFERRING = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")


def loads(page: Page) -> list[str]:
    """All that a page refers to but itself and what it holds."""
    found = [str(attrs[key]) for _, attrs in page.tags for key in REFERRING if attrs.get(key) is not None]
    found += re.findall(r"url\(['\"]?([^)]*)", page.text + str(page.tags)) + re.findall(r"@import[^;]*", page.text)
    return [value for value in found if not value.startswith(("data:", "#"))]


def test_it_loads_nothing_and_runs_nothing(reported: Path) -> None:
    page = Page(reported / "report.html")
    assert loads(page) == [] and len(page.images) == 8
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "form"}
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    policy = next(str(attrs["content"]) for _, attrs in page.tags if attrs.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    anchors = {str(attrs["href"])[1:] for tag, attrs in page.tags if tag == "a"}
    assert anchors and anchors <= {attrs.get("id") for _, attrs in page.tags}
    for image in page.images.values():  # what an image refers to must be in it, too
        assert {one for one in re.findall(rb'href="([^"]*)"', image) if not one.startswith(b"#")} == set()


def test_every_picture_has_words_and_a_file(reported: Path) -> None:
    page = Page(reported / "report.html")
    assert all(len(alt) > 40 for alt in page.images) and "TLM" in next(alt for alt in page.images if "Means" in alt)
    named = re.findall(r"!\[[^\n]*\]\(([^)\n]+)\)\n", (reported / "report.md").read_text())
    files = sorted(path.name for path in reported.glob("*.png"))
    assert sorted(named) == files and len(files) == len(page.images)
    assert all((reported / name).read_bytes().startswith(b"\x89PNG") for name in files)


def chromium(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The page as Chromium has it after loading, without a network; and what it complains of."""
    done = subprocess.run(
        [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--enable-logging=stderr", "--virtual-time-budget=5000", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={folder}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: apt-get install chromium")
def test_it_opens_offline_in_chromium(reported: Path, tmp_path: Path) -> None:
    text, complaints = chromium(reported / "report.html", tmp_path / "profile")
    assert complaints == [] and text.count("<img") == 8 and "Loss over the steps" in text
    (tmp_path / "bad.html").write_text('<img src="https://example.org/x.png"><script>nothing()</script>')
    _, complaints = chromium(tmp_path / "bad.html", tmp_path / "profile")
    assert any("nothing is not defined" in line for line in complaints)  # or the test above could not fail


def test_the_answer_is_that_of_the_rows(reported: Path) -> None:
    results = read_results(reported)
    text = Page(reported / "report.html").text
    answer = text[text.index("By accuracy, against HF default dropout, at a level of 5 %") :]
    for size in (25, 100):
        sentence = re.search(rf"With {size} examples, .*?\.(?= |$)(?! ?\d)", answer)
        assert sentence
        shown, _, same = sentence[0].partition("no difference shown for")
        for method in results.methods[1:]:
            verdict = results.rows[method, size, "accuracy"]["difference"]["verdict"]
            assert (results.labels[method] in same) == (verdict == "no difference shown")
        better = [m for m in results.methods[1:]
                  if results.rows[m, size, "accuracy"]["difference"]["verdict"] == "better"]  # fmt: skip
        assert all(results.labels[m] in shown.partition("shown better")[0] for m in better)


def test_it_says_when_nothing_is_shown(folder: Path) -> None:
    def level(summary: dict[str, Any]) -> None:
        for row in summary["rows"]:
            if row["difference"]:
                row["difference"].update(p=0.5, p_holm=1.0, verdict="no difference shown")

    change(folder / "summary.json", level)
    said = " ".join(wording.answer(read_results(folder)))
    assert "No difference shown: by accuracy, no method is shown to differ from HF default dropout" in said
    assert "is shown better" not in said and "is shown worse" not in said
    assert "no difference shown for no dropout, tuned dropout, TLM and DropHead." in said
    change(folder / "summary.json", lambda s: [row.update(difference=None) for row in s["rows"]])
    assert wording.answer(read_results(folder)) == [
        "Nothing can be said yet: no method has two seeds in common with HF default dropout."
    ]


def table(markdown: str, measure: str) -> list[list[str]]:
    part = markdown[markdown.index(f"### {measure}") :]
    lines = [line for line in part[: part.index("\n#", 5)].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| method")]


@pytest.mark.parametrize("measure", ["accuracy", "calibration error (ECE)"])
def test_tables_are_the_rows(reported: Path, measure: str) -> None:
    results = read_results(reported)
    name = next(name for name, one in results.measures.items() if one["label"] == measure)
    rows = table((reported / "report.md").read_text(), measure)
    assert len(rows) == 2 * len(METHODS)
    page = Page(reported / "report.html").text
    for found, (size, method) in zip(rows, [(s, m) for s in results.sizes for m in results.methods], strict=True):
        row = results.rows[method, size, name]
        numbers = [float(one) for one in re.findall(r"-?\d+\.\d+", found[2])]
        assert numbers == pytest.approx([row["mean"], row["low"], row["high"]], abs=6e-4)
        assert found[0] == results.labels[method] and found[5] == str(row["n"]) and found[2].replace("\\", "") in page
        if one := row["difference"]:
            assert found[1].split(" ", 1)[1] == one["verdict"]
            assert [float(part) for part in re.findall(r"[-+]\d+\.\d+", found[3])] == pytest.approx(
                [one["mean"], one["low"], one["high"]], abs=6e-4
            )
            assert found[4] == (r"&lt; 0.001" if one["p_holm"] < 0.001 else f"{one['p_holm']:.3f}")
        else:
            assert found[1] == "reference" and found[3] == found[4] == ""


def test_a_changed_number_changes_its_figure_and_no_other(reported: Path, folder: Path) -> None:
    def summary(found: dict[str, Any]) -> None:
        rows = {(row["method"], row["size"], row["measure"]): row for row in found["rows"]}
        rows["hf_default", 25, "ece"]["low"] = 0.0001
        rows["tlm", 25, "accuracy"]["difference"]["low"] = -0.456

    def cells(rows: list[dict[str, Any]]) -> None:
        rows[0]["history"][3]["eval_loss"] = 9.0  # at size 25
        rows[-1]["calibration"][9]["accuracy"] = 0.01  # at size 100

    change(folder / "summary.json", summary)
    change(folder / "cells.jsonl", cells)
    change(folder / "trials.jsonl", lambda rows: rows[0].update(params={"rate": 0.777}))
    write_report(folder)
    changed = {path.name for path in folder.glob("*.png") if path.read_bytes() != (reported / path.name).read_bytes()}
    assert changed == {"learning_curve-1-ece.png", "differences.png", "losses-25.png", "reliability-100.png"}
    before, after = Page(reported / "report.html"), Page(folder / "report.html")
    assert len(set(after.images.values()) - set(before.images.values())) == 4
    assert "0.777" in after.text and "0.777" not in before.text and "[-0.4560" in after.text


def test_a_mean_that_changed_everywhere_changes_figure_and_table(reported: Path, folder: Path) -> None:
    place = ("tlm", 25)

    def cells(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if (row["method"], row["size"]) == place:
                row["measures"]["accuracy"] = 0.4321

    def summary(found: dict[str, Any]) -> None:
        (row,) = (row for row in found["rows"] if (row["method"], row["size"], row["measure"]) == (*place, "accuracy"))
        row.update(mean=0.4321, low=0.4)

    change(folder / "cells.jsonl", cells)
    change(folder / "summary.json", summary)
    change(folder / "costs.jsonl", lambda rows: rows[1].update(low=0.5))
    assert "0.4321 [0.4000" in Page(write_report(folder)).text
    changed = {path.name for path in folder.glob("*.png") if path.read_bytes() != (reported / path.name).read_bytes()}
    assert changed == {"learning_curve-0-accuracy.png", "step_costs.png"}


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "c", sizes=(25,), seeds=2, names={"tlm": HOSTILE})
    change(folder / "summary.json", lambda s: s.update(model=HOSTILE, versions={HOSTILE: HOSTILE}))
    change(folder / "summary.json", lambda s: s["measures"][1].update(label=f"../../{HOSTILE}"))
    page = Page(write_report(folder))
    assert not {tag for tag, _ in page.tags} & {"script", "iframe"} and loads(page) == []
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert HOSTILE in page.text and any(HOSTILE in alt for alt in page.images)
    markdown = (folder / "report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown and r"\|\`'\$x^\$ \[a\](https://b)" in markdown
    assert [path.name for path in tmp_path.iterdir()] == ["c"]  # and no file anywhere else
    if CHROMIUM:
        text, complaints = chromium(folder / "report.html", tmp_path / "profile")
        assert complaints == [] and "<script" not in text


def test_a_grid_that_is_not_finished_says_so(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "c", seeds=2, leave_out=7)
    text = Page(write_report(folder)).text
    assert "not finished: 7 of 20 cells are missing" in text and "no cells yet" in text and "not compared yet" in text
    assert "**This comparison is not finished: 7 of 20" in (folder / "report.md").read_text()


def test_what_was_not_measured_is_not_invented(folder: Path) -> None:
    for name in ("costs.jsonl", "trials.jsonl"):
        (folder / name).unlink()
    change(folder / "cells.jsonl", lambda rows: [row.update(calibration=None, history=[]) for row in rows])
    for path in folder.glob("*.png"):
        path.unlink()
    page = Page(write_report(folder))
    assert "Not measured." in page.text and "Nothing: there was no search." in page.text
    assert len(page.images) == 3 == len(list(folder.glob("*.png"))) and "Calibration" not in page.text.split()


def test_penalties_search_and_limits_are_told(reported: Path, folder: Path) -> None:
    change(folder / "cells.jsonl", lambda rows: [row.update(penalties={"l2_sp": 0.03}) for row in rows[:5]])
    assert wording.penalties(read_results(folder))[0] == ("HF default dropout", "l2_sp 3 %")
    text = Page(reported / "report.html").text
    assert "6, 3 stopped early" in text and "rate 0.05 to 0.3" in text and "0.42" in text
    assert "tuned dropout, TLM and DropHead had their settings searched for; HF default dropout and no" in text
    assert "not over the 4 such tables" in text and "hf_reg 0.1.0" in text
    assert "Limits" in text and "TLM: the best rate found, 0.3, is near the end." in text.rpartition("Limits")[2]


def test_a_report_that_fails_leaves_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "costs.jsonl"}
    change(folder / "costs.jsonl", lambda rows: rows[0].update(low=0.5))

    def full(figure: Any, kind: str) -> bytes:
        if "svg" == kind:
            raise OSError("disk full")
        return b"another picture"

    monkeypatch.setattr(writing, "picture", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "costs.jsonl"}
