"""Differences to the reference, and step costs: a row for each method."""

from __future__ import annotations

import os
from typing import Any

from .reading import VERDICTS, Results, read_results
from .style import BLACK, BLUE, GREY, VERMILLION, drawn, ends, legend_below, plain, sheet


__all__ = ["difference_plot", "step_costs"]

MARKS: dict[str, dict[str, Any]] = {  # of each verdict: shape and filling say the same as the colour
    VERDICTS[0]: {"marker": "^", "color": BLUE, "markerfacecolor": BLUE},
    VERDICTS[1]: {"marker": "v", "color": VERMILLION, "markerfacecolor": VERMILLION},
    VERDICTS[2]: {"marker": "o", "color": GREY, "markerfacecolor": "white"},
}
COLUMNS = 3


@drawn
def difference_plot(folder: str | os.PathLike[str] | Results, measure: str | None = None) -> Any:
    """Draw each method's mean difference to the reference with its interval, and what that shows; a plot for each
    size.

    Args:
        folder (`str`, `PathLike` or [`Results`]): of a comparison.
        measure (`str`, *optional*): which of its measures; by default the metric of the task.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        `ValueError`: for a measure that the comparison has not, or has no differences of, and as [`read_results`].
            `ImportError`: without matplotlib.
    """
    from matplotlib.lines import Line2D

    results = read_results(folder)
    name = results.measure(measure)
    others = [method for method in results.methods if method != results.reference]
    found = {
        (method, size): row["difference"]
        for (method, size, own), row in results.rows.items()
        if own == name and row.get("difference")
    }
    if not found:
        raise ValueError(f"difference_plot: {results.folder} has no differences of {name!r}: one method, or no pair.")
    sizes = results.sizes
    columns = min(COLUMNS, len(sizes))
    lines = -(-len(sizes) // columns)
    figure = sheet(max(5.4, 1.6 + 1.95 * columns), 1.0 + lines * (0.75 + 0.27 * len(others)))
    grid = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False)
    for axes, size in zip(grid.flat, sizes, strict=False):
        axes.axvline(0, color=BLACK, linewidth=1)
        for place, method in enumerate(others):
            if not (one := found.get((method, size))):
                axes.annotate("no pair", (0, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
                continue
            axes.errorbar(
                one["mean"],
                place,
                xerr=[[end] for end in ends(one)],
                linestyle="none",
                markersize=7,
                label=method,
                **MARKS[one["verdict"]],
            )
        axes.set_title(f"{size} examples")
        axes.set_yticks(range(len(others)), [plain(results.labels[method], 22) for method in others])
    for axes in grid.flat[len(sizes) :]:
        axes.set_axis_off()
    grid[0, 0].set_ylim(len(others) - 0.5, -0.5)
    grid[0, 0].locator_params(axis="x", nbins=5)
    for column in range(columns):
        lowest = max(line for line in range(lines) if line * columns + column < len(sizes))
        grid[lowest, column].tick_params(labelbottom=True)
    better = "higher" if results.measures[name].get("higher_is_better") else "lower"
    label = plain(results.measures[name].get("label") or name)
    figure.suptitle(f"{label}: difference to {plain(results.labels[results.reference])} ({better} is better)")
    marks = [Line2D([], [], linestyle="none", markersize=7, **mark) for mark in MARKS.values()]
    legend_below(figure, marks, list(MARKS))
    return figure


@drawn
def step_costs(folder: str | os.PathLike[str] | Results) -> Any:
    """Draw how long a training step of each method takes, relative to the reference: median and quartiles.

    Args:
        folder (`str`, `PathLike` or [`Results`]): of a comparison, with costs.jsonl.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        `ValueError`: where no cost was measured, and as [`read_results`]. `ImportError`: without matplotlib.
    """
    results = read_results(folder)
    costs = {line["method"]: line for line in results.costs if line["method"] in results.methods}
    if not costs:
        raise ValueError(f"step_costs: {results.folder} has no step cost of its methods (costs.jsonl).")
    names = [method for method in results.methods if method in costs]
    figure = sheet(7, 1.3 + 0.3 * len(names))
    axes = figure.subplots()
    axes.axvline(1, color=BLACK, linewidth=1)
    for place, method in enumerate(names):
        cost = costs[method]
        spread = [[cost["ratio"] - cost["low"]], [cost["high"] - cost["ratio"]]]
        axes.errorbar(cost["ratio"], place, xerr=spread, marker="o", color=BLUE, markersize=7, label=method)
        axes.annotate(
            f"{cost['ratio']:.2f}", (cost["high"], place), (8, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(names)), [plain(results.labels[method]) for method in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel(f"time of a step, relative to {plain(results.labels[results.reference])} (median, quartiles)")
    return figure
