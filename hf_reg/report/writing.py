"""The report of a comparison as files: a page, the same as Markdown, and its figures."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from ..files import replacing
from . import wording
from .calibration import pool_bins, reliability
from .curves import learning_curves, loss_curves
from .differences import difference_plot, step_costs
from .reading import Results, read_results
from .style import in_style, picture


__all__ = ["write_report"]

HTML, MARKDOWN = "report.html", "report.md"


@dataclass(frozen=True)
class Picture:
    """A figure of the report, with what is said about it."""

    file: str
    title: str
    alt: str
    caption: str
    figure: Any

    @cached_property
    def svg(self) -> str:
        return base64.b64encode(picture(self.figure, "svg")).decode()


def _file(*parts: object) -> str:
    """The name of a PNG, of letters that every file system has."""
    return "-".join(re.sub(r"[^A-Za-z0-9_]+", "_", str(part))[:60] for part in parts) + ".png"


def _means(results: Results, measure: str, size: int) -> str:
    found = [
        f"{results.labels[method]} {row['mean']:.3g}"
        for method in results.methods
        if (row := results.rows.get((method, size, measure))) and row["n"]
    ]
    return f"with {size} examples: {', '.join(found)}" if found else f"with {size} examples nothing yet"


def _curve(results: Results, number: int, measure: str) -> Picture:
    label = results.measures[measure].get("label") or measure
    first, last = results.sizes[0], results.sizes[-1]
    ends = dict.fromkeys((first, last))
    means = "; ".join(_means(results, measure, size) for size in ends)
    return Picture(
        _file("learning_curve", number, measure), f"{label} over the number of examples",
        f"Line chart of {label} over the number of training examples. Means {means}.",
        f"{label} over the number of training examples; bars are bootstrap 95 % intervals of the mean. Methods stand "
        "side by side.",
        learning_curves(results, measure),
    )  # fmt: skip


def _difference(results: Results) -> list[Picture]:
    measure = results.measure(None)
    if not any(row.get("difference") for (_, _, own), row in results.rows.items() if own == measure):
        return []
    label = results.measures[measure].get("label") or measure
    said = f"Difference in {label} to {results.labels[results.reference]}"
    return [
        Picture(
            "differences.png", said,
            f"{said}, a point for each method and size. {' '.join(wording.answer(results))}",
            f"{said}, mean over the pairs with its bootstrap 95 % interval. Filled: shown at a level of "
            f"{100 * results.summary['alpha']:.3g} % after Holm's correction.",
            difference_plot(results),
        )
    ]  # fmt: skip


def _last(histories: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
    return [own[-1]["eval_loss"] for own in histories if own[-1].get("eval_loss") is not None]


def _losses(results: Results, size: int) -> list[Picture]:
    histories = {
        results.labels[method]: [cell["history"] for cell in results.cells_of(method, size) if cell["history"]]
        for method in results.methods
    }
    histories = {label: own for label, own in histories.items() if own}
    if not histories:
        return []
    ends = [f"{label} {mean(last):.3g}" for label, own in histories.items() if (last := _last(own))]
    return [
        Picture(
            _file("losses", size), f"Loss over the steps, {size} examples",
            f"Line charts of training and held-out loss over the steps with {size} examples. Held-out loss at the "
            f"end: {', '.join(ends)}.",
            f"With {size} examples, mean of the seeds; training loss in evaluation mode, without penalties.",
            loss_curves(histories, reference=results.labels[results.reference], title=f"{size} examples"),
        )
    ]  # fmt: skip


def _reliability(results: Results, size: int) -> list[Picture]:
    pooled = {
        results.labels[method]: bins
        for method in results.methods
        if (
            bins := pool_bins(
                cell["calibration"] for cell in results.cells_of(method, size) if cell.get("calibration")
            )
        )
    }
    if not pooled:
        return []
    return [
        Picture(
            _file("reliability", size), f"Reliability, {size} examples",
            f"Reliability diagrams with {size} examples, a plot for each of {', '.join(pooled)}: accuracy over "
            "confidence in ten bins, and the number of predictions in each.",
            f"With {size} examples, the held-out predictions of all seeds together; the mean of the seeds' own errors "
            "is in the table of ECE, if it was measured. Below the dashed line a model is surer than it is right.",
            reliability(pooled, title=f"{size} examples"),
        )
    ]  # fmt: skip


def _costs(results: Results, costs: list[tuple[str, str, str, str]]) -> list[Picture]:
    if not costs:
        return []
    reference = results.labels[results.reference]
    said = ", ".join(f"{method} {ratio}" for method, ratio, _, _ in costs)
    return [
        Picture(
            "step_costs.png", "Cost of a step",
            f"Time of a training step relative to {reference}: {said}.",
            f"Time of a training step, relative to {reference}; median and quartiles of steps timed in turn.",
            step_costs(results),
        )
    ]  # fmt: skip


def _context(results: Results) -> dict[str, Any]:
    """All that the templates lay out."""
    curves = {measure: _curve(results, number, measure) for number, measure in enumerate(results.measures)}
    first, *others = curves
    costs = wording.costs(results)
    ends = dict.fromkeys((results.sizes[0], results.sizes[-1]))
    facts = wording.facts(results)
    return {
        "title": f"{len(results.methods)} methods compared on {results.summary['model']}",
        "question": wording.question(results), "progress": wording.progress(results),
        "answer": wording.answer(results), "reference": results.labels[results.reference],
        "overview": [*_difference(results), curves[first]],
        "measures": [
            {
                "label": own.get("label") or name, "tables": wording.table(results, name),
                "direction": "higher" if own.get("higher_is_better") else "lower",
                "pictures": [curves[name]] if name in others else [],
            }
            for name, own in results.measures.items()
        ],
        "losses": [one for size in ends for one in _losses(results, size)],
        "calibration": [one for size in ends for one in _reliability(results, size)],
        "penalties": wording.penalties(results), "costs": costs, "cost_pictures": _costs(results, costs),
        "searched": bool(results.trials), "trials": wording.trials(results), **facts,
        "limits": wording.limits(results),
    }  # fmt: skip


def _markdown(value: Any) -> Any:
    """All texts in `value` so that Markdown shows them as they are, also within a table."""
    if isinstance(value, Mapping):
        return {key: _markdown(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_markdown(one) for one in value]
    if isinstance(value, Picture):
        return {"file": value.file, "alt": _markdown(value.alt), "caption": _markdown(value.caption)}
    if not isinstance(value, str):
        return value
    line = " ".join(value.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", line)


def _render(context: Mapping[str, Any]) -> dict[str, str]:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    shared: dict[str, Any] = {
        "loader": FileSystemLoader(Path(__file__).parent), "undefined": StrictUndefined, "trim_blocks": True,
        "lstrip_blocks": True, "keep_trailing_newline": True,
    }  # fmt: skip
    page = Environment(autoescape=True, **shared).get_template("report.html.j2").render(context)
    text = Environment(autoescape=False, **shared).get_template("report.md.j2").render(_markdown(context))
    return {HTML: page, MARKDOWN: re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"}


def write_report(folder: str | os.PathLike[str] | Results) -> Path:
    """Write the report of a comparison into its folder, from its JSON lines alone.

    `report.html` holds everything, figures included, and loads nothing; `report.md` shows the PNG files beside it.
    Each file is replaced in one step, and only when all of them could be made.

    Args:
        folder (`str`, `PathLike` or [`Results`]): with summary.json and cells.jsonl, and with costs.jsonl and
            trials.jsonl where there are any. A comparison that is not finished is reported as such.

    Returns:
        `Path`: of `report.html`.

    Raises:
        `ValueError`: as [`read_results`]. `ImportError`: without matplotlib.
    """
    results = read_results(folder)
    with in_style():
        context = _context(results)
    pictures = [one for part in ("overview", "losses", "calibration", "cost_pictures") for one in context[part]]
    pictures += [one for measure in context["measures"] for one in measure["pictures"]]
    made: dict[str, bytes] = {one.file: picture(one.figure, "png") for one in pictures}
    made |= {name: text.encode() for name, text in sorted(_render(context).items(), reverse=True)}
    for name, content in made.items():
        with replacing(results.folder / name) as unfinished:
            unfinished.write_bytes(content)
    return results.folder / HTML
