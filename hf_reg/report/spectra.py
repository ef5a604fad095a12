"""How far training moved the singular values of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..adapters.drift import LayerDrift, spectrum_drift
from ..adapters.pairs import weight_pairs
from ..adapters.svd import readable, widened
from ..adapters.triplets import full_precision
from .style import BLACK, COLOURS, MARKERS, VERMILLION, drawn, legend_below, plain, sheet


__all__ = ["drift_plot", "singular_values"]

COLUMNS = 3


@drawn
def drift_plot(kinds: Mapping[str, Sequence[LayerDrift]]) -> Any:
    """Draw singular-vector over singular-value drift, a point per layer, in the colour and shape of its kind.

    Args:
        kinds (`dict` of lists of [`LayerDrift`]): what [`SpectrumDrift`] has as `kinds`; its `plot()` draws this.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        `ImportError`: without matplotlib.
    """
    figure = sheet(7, 4.6)
    axes = figure.subplots()
    for number, (kind, rows) in enumerate(kinds.items()):
        axes.scatter(
            [row.values for row in rows], [row.vectors for row in rows], label=plain(kind), s=44, alpha=0.85,
            color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)], linewidths=0,
        )  # fmt: skip
    axes.set(
        title="Drift of singular values and singular vectors", xlim=(0, None), ylim=(0, None),
        xlabel=r"$\Delta\Sigma$, mean change of a singular value", ylabel=r"$\Delta D$, mean change of direction",
    )  # fmt: skip
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _values(weight: torch.Tensor) -> list[float]:
    weight = readable(weight)
    with full_precision(weight):
        return torch.linalg.svdvals(widened(weight, 1)).tolist()


@drawn
def singular_values(
    base: nn.Module | Mapping[str, torch.Tensor] | None,
    tuned: nn.Module | Mapping[str, torch.Tensor],
    *,
    target_modules: str | Sequence[str] | None = None,
    most: int = 6,
) -> Any:
    """Draw the singular values of layers before and after training.

    Args:
        base (`nn.Module`, state dict or `None`): the pretrained model; `None` takes the base weights of `tuned`, a
            `PeftModel`.
        tuned (`nn.Module` or state dict): the fine-tuned model; adapters count as if they were merged.
        target_modules (`str` or list of `str`, *optional*): the layers, as in PEFT; by default every linear one.
        most (`int`, *optional*, defaults to 6): how many layers to show: those whose singular values moved most, in
            the model's order.

    Returns:
        `matplotlib.figure.Figure`: a plot for each layer, above it Delta Sigma and Delta D of [`LayerDrift`].

    Raises:
        `ValueError`, `TypeError`: as [`spectrum_drift`]. `ImportError`: without matplotlib.
    """
    if most < 1:
        raise ValueError(f"singular_values: most={most}; expected at least 1.")
    rows = spectrum_drift(base, tuned, target_modules=target_modules).rows
    moved = sorted(rows, key=lambda row: -row.values)[:most]
    shown = [row for row in rows if row in moved][:most]
    pairs = weight_pairs(base, tuned, target_modules)
    columns = min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure = sheet(max(4.6, 2.5 * columns), 0.9 + 2.5 * lines)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, row in zip(grid.flat, shown, strict=False):
        before, after = (_values(weight) for weight in pairs[row.name]())
        axes.plot(range(1, len(before) + 1), before, color=BLACK, label="before")
        axes.plot(range(1, len(after) + 1), after, color=VERMILLION, linestyle=(0, (4, 1.5)), label="after")
        axes.set_title(f"{_short(row.name)}\n$\\Delta\\Sigma$ {row.values:.2g}   $\\Delta D$ {row.vectors:.2g}")
        axes.set_ylim(0, None)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for column in range(columns):
        below = max(row for row in range(lines) if row * columns + column < len(shown))
        grid[below, column].set_xlabel("number of the singular value", fontsize=9)
    figure.supylabel("singular value", fontsize=10)
    legend_below(figure, *grid[0, 0].get_legend_handles_labels())
    which = "all layers" if len(shown) == len(rows) else f"the {len(shown)} of {len(rows)} layers that moved most"
    figure.suptitle(f"Singular values: {which}")
    return figure


def _short(name: str) -> str:
    """The end of a module's name, from its layer on, where it is too long for a title."""
    parts, line = name.split("."), name
    while len(line) > 26 and len(parts) > 1:
        parts = parts[1:]
        line = "…" + ".".join(parts)
    return plain(line, 26)
