"""The learning curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import replacing
from ..messages import say
from ..report import loss_curves
from ..report.history import find_series


__all__ = ["draw_curve"]


def draw_curve(history: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Draw the losses over the steps into `path`; whether there was something to draw, and something to draw with."""
    if all(len(find_series(history, key)[0]) < 2 for key in ("loss_task", "loss", "eval_loss")):
        return False
    try:
        figure = loss_curves(history)
    except ImportError:
        say("The model card gets no learning curve: matplotlib is missing (pip install 'hf_reg[report]').")
        return False
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    return True
