"""A comparison over the number of examples, and losses over the steps of training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import exp, log
from statistics import mean
from typing import Any

from .history import Log, Series, find_series, logs_of, need_series
from .reading import Results, read_results
from .style import BLACK, BLUE, VERMILLION, drawn, ends, legend_below, looks, plain, sheet


__all__ = ["learning_curves", "loss_curves"]

TRAIN = ("train_loss", "loss_task", "loss")  # of a comparison's cell; of our trainer, without penalties; of any
HELD_OUT = ("eval_loss",)


@drawn
def learning_curves(folder: str | os.PathLike[str] | Results, measure: str | None = None) -> Any:
    """Draw a measure over the number of training examples, a line for each method, with the intervals of the means.

    Args:
        folder (`str`, `PathLike` or [`Results`]): of a comparison.
        measure (`str`, *optional*): which of its measures; by default the metric of the task.

    Returns:
        `matplotlib.figure.Figure`: the methods of one size stand side by side, so that their intervals can be seen.

    Raises:
        `ValueError`: for a measure that the comparison has not, and as [`read_results`]. `ImportError`: without
            matplotlib.
    """
    results = read_results(folder)
    name = results.measure(measure)
    sizes, methods = results.sizes, results.methods
    gap = min((log(b / a) for a, b in zip(sizes, sizes[1:], strict=False)), default=0.5)
    figure = sheet(7, 4.2 + 0.22 * ((len(methods) + 2) // 3))
    axes = figure.subplots()
    for i, (method, look) in enumerate(_in_order(methods, results.reference).items()):
        rows = [row for size in sizes if (row := results.rows.get((method, size, name))) and row["mean"] is not None]
        aside = exp(0.35 * gap * (i - (len(methods) - 1) / 2) / len(methods))
        means = [row["mean"] for row in rows]
        spread = [ends(row) for row in rows]
        axes.errorbar(
            [row["size"] * aside for row in rows],
            means,
            yerr=list(zip(*spread, strict=True)) or None,
            label=plain(results.labels[method]),
            **look,
        )
    measured = results.measures[name]
    better = "higher is better" if measured.get("higher_is_better") else "lower is better"
    seeds = len(results.summary["seeds"])
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set(
        xlabel="training examples", ylabel=f"{plain(measured.get('label') or name)} ({better})",
        title=f"Mean of {seeds} seed{'s' * (seeds != 1)}, with its 95 % interval",
    )  # fmt: skip
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def _in_order(methods: Sequence[str], reference: str) -> dict[str, dict[str, Any]]:
    found = looks(methods, reference)
    return {method: found[method] for method in methods}


def _runs(histories: Any) -> dict[str, list[list[Log]]]:
    """Label to runs, from one run or from a mapping whose values are one run or several."""
    if not isinstance(histories, Mapping):
        return {"": [logs_of(histories)]}
    found = {}
    for label, own in histories.items():
        several = isinstance(own, Sequence) and own and not isinstance(own[0], Mapping)
        found[str(label)] = [logs_of(run) for run in (own if several else [own])]
    if not found:
        raise ValueError("loss_curves: no history.")
    return found


def _mean(series: Sequence[Series]) -> Series:
    """The mean at each step, over the runs that have it."""
    at: dict[int, list[float]] = {}
    for steps, values in series:
        for step, value in zip(steps, values, strict=True):
            at.setdefault(step, []).append(value)
    return sorted(at), [mean(at[step]) for step in sorted(at)]


def _from_zero(*axes: Any) -> None:
    """Let the axis that they share begin at 0, unless a value lies below."""
    if all(axis.dataLim.y0 >= 0 for axis in axes):
        axes[0].set_ylim(0, None)


@drawn
def loss_curves(histories: Any, *, reference: str | None = None, title: str = "") -> Any:
    """Draw training and held-out loss over the steps.

    Args:
        histories (`Trainer`, its `state` or `log_history`; or a `dict` of them):
            One run, or runs by label; under a label there may be a list of runs (of several seeds), whose mean is
            drawn. Histories of a comparison's cells are such logs. Training loss is `train_loss`, or `loss_task`, or
            `loss`, the first that a log has.
        reference (`str`, *optional*): the label that is drawn in black.
        title (`str`, *optional*): above the figure.

    Returns:
        `matplotlib.figure.Figure`: of one run both losses in one plot, with the best held-out step marked; of several
        labels training on the left and held out on the right, with the same axis.

    Raises:
        `ValueError`: where a run has neither loss; names what it has. `TypeError`: for something without logs.
        `ImportError`: without matplotlib.
    """
    runs = _runs(histories)
    for label, own in runs.items():
        for logs in own:
            if not find_series(logs, *HELD_OUT)[0]:
                try:
                    need_series(logs, *TRAIN)
                except ValueError as error:
                    raise ValueError(f"loss_curves{f' ({label})' * bool(label)}: {error}") from error
    if len(runs) == 1:
        [(label, own)] = runs.items()
        return _one(own, title or label)
    figure = sheet(7.4, 3.6 + 0.22 * ((len(runs) + 2) // 3))
    axes = figure.subplots(1, 2, sharey=True)
    found = looks(list(runs), reference)
    for axis, keys, name in zip(axes, (TRAIN, HELD_OUT), ("training", "held-out"), strict=True):
        for label, own in runs.items():
            steps, values = _mean([find_series(logs, *keys) for logs in own])
            axis.plot(steps, values, label=plain(label), markevery=max(len(steps) // 8, 1), **found[label])
        axis.set(title=f"{name} loss", xlabel="step")
    axes[0].set_ylabel("loss")
    _from_zero(*axes)
    legend_below(figure, *axes[1].get_legend_handles_labels())
    figure.suptitle(plain(title, 80)) if title else None
    return figure


def _one(runs: Sequence[Sequence[Log]], title: str) -> Any:
    figure = sheet(7, 3.8)
    axes = figure.subplots()
    for keys, label, look in (
        (TRAIN, "training", {"color": BLUE, "linestyle": (0, (6, 2)), "marker": "s"}),
        (HELD_OUT, "held out", {"color": BLACK, "linestyle": "-", "marker": "o"}),
    ):
        series = [find_series(logs, *keys) for logs in runs]
        steps, values = _mean(series)
        if not steps:
            continue
        for one in series if len(series) > 1 else ():
            axes.plot(*one, color=look["color"], linewidth=0.7, alpha=0.35)
        axes.plot(steps, values, label=label, markevery=max(len(steps) // 20, 1), **look)
        if keys == HELD_OUT and len(steps) > 1:
            best = values.index(min(values))
            axes.plot(
                steps[best], values[best], label=f"lowest held-out loss: {values[best]:.3g} at step {steps[best]}",
                marker="*", markersize=15, color=VERMILLION, linestyle="none", zorder=3,
            )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss", title=plain(title, 80))
    _from_zero(axes)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure
