"""How much each penalty weighs."""

from __future__ import annotations

from typing import Any

from .history import find_series, logs_of
from .style import COLOURS, GREY, drawn, looks, plain, sheet


__all__ = ["penalty_shares"]

PARTS = ("dpo", "sft")  # of the task's own loss, as RPOTrainer logs them: no terms beside it


@drawn
def penalty_shares(history: Any) -> Any:
    """Draw the share of each term in the training loss over the steps and, if they were logged, in the gradient.

    Args:
        history (`Trainer`, its `state` or `log_history`): of a [`RegularizedTrainer`] with penalties, which logs
            `loss_task` and `loss_<name>`; with `gradient_shares=True` also `share_<name>`. A term may be negative: its
            share is that of its size.

    Returns:
        `matplotlib.figure.Figure`: areas that add up to 100 %, the task below; of the gradient, lines.

    Raises:
        `ValueError`: where no penalty was logged; names what was. `TypeError`: for something without logs.
        `ImportError`: without matplotlib.
    """
    logs = [log for log in logs_of(history) if "loss" in log and "step" in log]
    seen = dict.fromkeys(key.removeprefix("loss_") for log in logs for key in log if key.startswith("loss_"))
    names = ["task", *(name for name in seen if name != "task" and not ("task" in seen and name in PARTS))]
    if "task" not in seen or len(names) < 2:
        there = ", ".join(repr(key) for key in sorted({key for log in logs for key in log}))
        raise ValueError(
            f"penalty_shares: the training logs have {there or 'no key'}; expected 'loss_task' and a 'loss_<name>', "
            "as RegularizedTrainer logs them with penalties=."
        )
    logs = [log for log in logs if "loss_task" in log]
    steps = [int(log["step"]) for log in logs]
    sizes = [[abs(log.get(f"loss_{name}", 0.0)) for log in logs] for name in names]
    totals = [sum(column) or 1.0 for column in zip(*sizes, strict=True)]
    shares = [[value / total for value, total in zip(row, totals, strict=True)] for row in sizes]
    gradient = {name: found for name in names if (found := find_series(logs, f"share_{name}"))[0]}

    figure = sheet(7, 6.2 if gradient else 3.9)
    axes = figure.subplots(2 if gradient else 1, 1, sharex=True, squeeze=False)[:, 0]
    colours = ["#d9d9d9", *(COLOURS[i % (len(COLOURS) - 1)] for i in range(len(names) - 1))]
    hatches = ["", *("", "///", "...", "xxx", "\\\\\\")]
    average = [sum(row) / len(row) for row in shares]
    labels = [f"{plain(name)} (mean {100 * share:.2g} %)" for name, share in zip(names, average, strict=True)]
    axes[0].stackplot(
        steps, shares, labels=labels, colors=colours, edgecolor="white", linewidth=0.6,
        hatch=[hatches[i % len(hatches)] for i in range(len(names))],
    )  # fmt: skip
    axes[0].set(ylim=(0, 1), title="Share of the training loss")
    axes[0].margins(x=0)
    if gradient:
        styles = looks([name for name in names if name != "task"])
        styles["task"] = {"color": GREY, "linestyle": "-", "marker": "o"}
        for name, (at, values) in gradient.items():
            axes[1].plot(at, values, label=plain(name), markevery=max(len(at) // 10, 1), **styles[name])
        axes[1].set(ylim=(0, 1), title="Share of the gradient's norm")
        axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in axes:
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes[-1].set_xlabel("step")
    axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return figure
