"""The learning curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import replacing
from ..messages import say


__all__ = ["draw_curve"]

LINES = (
    ("loss_task", "training (task)", "#1f77b4"),
    ("loss", "training", "#7f7f7f"),
    ("eval_loss", "held out", "#e07b00"),
)


def draw_curve(history: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Draw the losses over the steps into `path`; whether there was something to draw, and something to draw with."""
    lines = []
    for key, label, colour in LINES:
        points = [(log["step"], log[key]) for log in history if key in log and "step" in log]
        if len(points) > 1:
            lines.append((points, label, colour))
    if not lines:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say("The model card gets no learning curve: matplotlib is missing (pip install 'hf_reg[report]').")
        return False
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for points, label, colour in lines:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    return True
