"""The picture of a diagnosis: losses over the steps, what was found where, and how much the penalties weigh."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from ..diagnosis.curves import penalty_names
from .style import BLACK, BLUE, GREY, ORANGE, VERMILLION, drawn, looks, plain, sheet


if TYPE_CHECKING:
    from ..diagnosis import OverfitReport

__all__ = ["draw_diagnosis"]

LINE = 112  # characters of the text below, which is as wide as the figure


@drawn
def draw_diagnosis(report: OverfitReport) -> Any:
    """Draw what [`~hf_reg.diagnose`] found.

    Args:
        report ([`OverfitReport`]): of a run.

    Returns:
        `matplotlib.figure.Figure`: above the losses, with the best step and the steps of the findings marked; below
        the penalties' shares, where there are penalties; at the foot the findings in words.

    Raises:
        `ImportError`: without matplotlib.
    """
    shares = _shares(report)
    text = _words(report)
    lines = text.count("\n") + 1
    height = 3.9 + (2.0 if shares else 0) + 0.19 * lines + 0.25
    figure = sheet(8, height)
    rows = [3.6, *([1.7] if shares else []), 0.19 * lines + 0.15]
    axes = figure.subplots(len(rows), 1, height_ratios=rows)
    _losses(axes[0], report)
    if shares:
        _draw_shares(axes[1], shares)
        axes[1].sharex(axes[0])
    axes[-2].set_xlabel("step")
    axes[-1].set_axis_off()
    axes[-1].text(0, 1, text, va="top", transform=axes[-1].transAxes, fontsize=8.5, linespacing=1.35)
    figure.suptitle("\n".join(textwrap.wrap(plain(f"{report.run.name}: {report.headline}", 3 * LINE), LINE - 20)))
    return figure


def _losses(axes: Any, report: OverfitReport) -> None:
    curves = report.curves
    task = any("loss_task" in log for log in report.run.history)
    axes.plot(*zip(*curves.train, strict=True), color=BLUE, linewidth=0.8, alpha=0.35)
    windows = curves.windows
    axes.plot(
        *zip(*windows, strict=True), color=BLUE, marker="o" if len(windows) < 40 else "", linestyle=(0, (6, 2)),
        label=f"training{' (task)' if task else ''}, mean of {curves.span} log{'s' * (curves.span > 1)}",
    )  # fmt: skip
    if curves.held_out:
        many = len(curves.held_out) >= 40
        axes.plot(*zip(*curves.held_out, strict=True), color=VERMILLION, marker="" if many else "s", label="held out")
    if report.best_step is not None:
        axes.plot(
            report.best_step, report.best_loss, marker="*", markersize=15, color=ORANGE, markeredgecolor=BLACK,
            linestyle="", zorder=5, label=f"lowest held out: step {report.best_step}",
        )  # fmt: skip
    steps: dict[int, list[str]] = {}
    for number, finding in enumerate(report.findings, 1):
        if finding.step is not None:
            steps.setdefault(finding.step, []).append(f"{number} {finding.kind}")
    for row, (step, kinds) in enumerate(sorted(steps.items())):
        right = step > 0.6 * curves.last_step
        axes.axvline(step, color=GREY, linewidth=1.2, linestyle=":")
        axes.annotate(
            ", ".join(kinds), (step, 0.97 - 0.08 * (row % 4)), xycoords=("data", "axes fraction"), fontsize=9,
            xytext=(-4 if right else 4, 0), textcoords="offset points", ha="right" if right else "left", va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
    over = next((one for one in report.findings if one.kind == "over-fitting"), None)
    if over is not None:
        axes.axvspan(over.step, curves.last_step, color=VERMILLION, alpha=0.07, linewidth=0)
    axes.set(ylabel="loss")
    axes.set_xlim(0, 1.02 * curves.last_step)
    axes.margins(y=0.08)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3)


def _shares(report: OverfitReport) -> dict[str, list[tuple[float, float]]]:
    """Of each penalty, in the loss, or in the gradient, where that was logged."""
    found: dict[str, list[tuple[float, float]]] = {}
    names = penalty_names(report.run.history)
    for name in names:
        for log in report.run.history:
            total = sum(abs(log.get(f"loss_{term}", 0.0)) for term in ("task", *names))
            if f"loss_{name}" in log and total and math.isfinite(total):
                found.setdefault(f"{name}, of the loss", []).append((log["step"], abs(log[f"loss_{name}"]) / total))
            if f"share_{name}" in log and math.isfinite(log[f"share_{name}"]):
                found.setdefault(f"{name}, of the gradient", []).append((log["step"], log[f"share_{name}"]))
    return found


def _draw_shares(axes: Any, shares: dict[str, list[tuple[float, float]]]) -> None:
    for (name, points), look in zip(shares.items(), looks(list(shares)).values(), strict=True):
        axes.plot(*zip(*points, strict=True), label=plain(name, 40), markevery=max(len(points) // 8, 1), **look)
    for share, text in ((0.5, "dominates"), (0.01, "does nothing")):
        axes.axhline(share, color=GREY, linewidth=0.9, linestyle=":")
        axes.text(1, share, f" {text}", transform=axes.get_yaxis_transform(), fontsize=8, va="center", color=GREY)
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.5)
    axes.set(ylim=(0, 1.2), ylabel="share of a penalty")
    axes.set_yticks([0, 0.01, 0.1, 1], ["0", "1 %", "10 %", "100 %"])
    axes.set_yticks([], minor=True)
    axes.legend(loc="best", ncols=2)


def _words(report: OverfitReport) -> str:
    found = [f"{number} {one.kind}: {one.text}" for number, one in enumerate(report.findings, 1)]
    found = found or ["Nothing stands out."]
    found += [f"Next: {report.next_steps[0]}"]
    lines = [line for text in found for line in textwrap.wrap(text, LINE, subsequent_indent="   ")]
    return "\n".join(lines).replace("$", r"\$")
