"""Whether a model is as sure as it is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .style import BLACK, BLUE, ORANGE, drawn, legend_below, plain, sheet


__all__ = ["calibration_error", "pool_bins", "reliability"]

Bin = Mapping[str, float]
FIELDS = ("low", "high", "count", "confidence", "accuracy")
COLUMNS = 3


def _filled(bins: Iterable[Bin]) -> list[Bin]:
    found = []
    for number, one in enumerate(bins):
        if lacking := [name for name in FIELDS if name not in one]:
            raise ValueError(f"Bin {number} has no {lacking[0]!r}; it has {', '.join(map(repr, one)) or 'no key'}.")
        if one["count"]:
            found.append(one)
    return found


def pool_bins(calibrations: Iterable[Iterable[Bin]]) -> list[dict[str, float]]:
    """The bins of several runs as those of all their predictions together.

    Args:
        calibrations (iterable of lists of `dict`): each with the keys low, high, count, confidence and accuracy.
    """
    sums: dict[tuple[float, float], list[float]] = {}
    for bins in calibrations:
        for one in _filled(bins):
            total = sums.setdefault((one["low"], one["high"]), [0.0, 0.0, 0.0])
            for i, part in enumerate((1.0, one["confidence"], one["accuracy"])):
                total[i] += one["count"] * part
    return [
        {"low": low, "high": high, "count": count, "confidence": sure / count, "accuracy": right / count}
        for (low, high), (count, sure, right) in sorted(sums.items())
    ]


def calibration_error(bins: Iterable[Bin]) -> float:
    """The expected calibration error: sum_b n_b / n |accuracy_b - confidence_b| (Naeini et al., AAAI 2015)."""
    filled = _filled(bins)
    total = sum(one["count"] for one in filled)
    if not total:
        raise ValueError("The bins hold no prediction.")
    return sum(one["count"] / total * abs(one["accuracy"] - one["confidence"]) for one in filled)


@drawn
def reliability(bins: Sequence[Bin] | Mapping[str, Sequence[Bin]], *, title: str = "") -> Any:
    """Draw a reliability diagram: accuracy over confidence, and how many predictions there were of each confidence.

    Args:
        bins (list of `dict`, or a `dict` of such lists): each bin with the keys low, high, count, confidence (mean of
            the largest probability) and accuracy; several lists by label are drawn side by side. [`pool_bins`] joins
            those of several seeds.
        title (`str`, *optional*): above the figure.

    Returns:
        `matplotlib.figure.Figure`: the expected calibration error (ECE) stands above each plot; on the dashed line
        a model is right as often as it says.

    Raises:
        `ValueError`: for bins without predictions or with other keys. `ImportError`: without matplotlib.
    """
    several = bins if isinstance(bins, Mapping) else {"": bins}
    if not several:
        raise ValueError("reliability: no bins.")
    columns = min(COLUMNS, len(several))
    lines = -(-len(several) // columns)
    figure = sheet(4.2 if columns == 1 else 2.45 * columns, lines * (3.9 if columns == 1 else 3.1) + 0.45)
    ratios = {"height_ratios": [3, 1] * lines}
    grid = figure.subplots(2 * lines, columns, sharex=True, squeeze=False, gridspec_kw=ratios)
    for number, (label, own) in enumerate(several.items()):
        line, column = divmod(number, columns)
        _draw(grid[2 * line, column], grid[2 * line + 1, column], plain(label, 22), _filled(own))
        if column == 0:
            grid[2 * line, 0].set_ylabel("accuracy")
            grid[2 * line + 1, 0].set_ylabel("count")
        grid[2 * line + 1, column].tick_params(labelbottom=True)
        grid[2 * line + 1, column].set_xlabel("confidence")
    for number in range(len(several), lines * columns):
        line, column = divmod(number, columns)
        grid[2 * line, column].set_axis_off()
        grid[2 * line + 1, column].set_axis_off()
    legend_below(figure, *grid[0, 0].get_legend_handles_labels())
    figure.suptitle(plain(title, 80)) if title else None
    return figure


def _draw(axes: Any, counts: Any, label: str, bins: list[Bin]) -> None:
    error = calibration_error(bins)
    left, widths = [one["low"] for one in bins], [one["high"] - one["low"] for one in bins]
    right, sure = [one["accuracy"] for one in bins], [one["confidence"] for one in bins]
    bars = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
    axes.bar(left, right, widths, color=BLUE, label="accuracy", **bars)
    axes.plot([0, 1], [0, 1], color=BLACK, linestyle=(0, (4, 2)), linewidth=1.2, label="as sure as right")
    axes.plot(
        sure, right, linestyle="none", marker="D", markersize=5, color=ORANGE, markeredgecolor=BLACK,
        markeredgewidth=0.8, label="at its mean confidence", clip_on=False, zorder=4,
    )  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "", "0.5", "", "1"])
    axes.set_title(f"{label}\nECE {error:.3f}" if label else f"ECE {error:.3f}")
    counts.bar(left, [one["count"] for one in bins], widths, color="#8c8c8c", **bars)
    counts.set_ylim(0, None)
    counts.locator_params(axis="y", nbins=2)
