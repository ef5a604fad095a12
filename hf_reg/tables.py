"""Reports that print as a table in a terminal and show as one in a notebook."""

from __future__ import annotations

import io
import sys

from rich.console import Console, RenderableType


__all__ = ["Shown", "terminal"]


def terminal() -> Console:
    """The console of standard output; 120 columns wide where that is a file or a pipe, so that no table is cut."""
    return Console(width=None if sys.stdout.isatty() else 120)


class Shown:
    """Base of reports: `print` it, or leave it to the notebook. Subclasses say what to draw in `_table`."""

    def _table(self) -> RenderableType:
        raise NotImplementedError(f"{type(self).__name__} must define `_table()`.")

    def _render(self, width: int) -> Console:
        console = Console(record=True, file=io.StringIO(), width=width, force_jupyter=False)  # else shown twice there
        console.print(self._table())
        return console

    def __str__(self) -> str:
        return self._render(120).export_text(styles=False).rstrip("\n")

    def _repr_html_(self) -> str:
        return self._render(140).export_html(inline_styles=True, code_format="<pre>{code}</pre>")
