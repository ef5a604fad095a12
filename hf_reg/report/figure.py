"""A figure that notebooks show, though no window and no list of open figures knows of it. Imported where one is
drawn."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .style import picture


__all__ = ["Sheet"]


class Sheet(Figure):
    """A [`~matplotlib.figure.Figure`] of a size in inches."""

    def __init__(self, width: float = 6.4, height: float = 4.8) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        return picture(self, "png", dpi=100)
