"""How far a comparison is: a bar in a terminal, a line for each run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


__all__ = ["Counter", "counting", "duration"]


def duration(seconds: float) -> str:
    """In words, such as `"3 min"`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


class Counter:
    """Counts work, and tells what is left of it.

    Args:
        console (`Console`): where it is told.
        total (`float`): the work of the whole grid, in any unit.
        done (`float`): of it before this run.
        bar (`Progress`, *optional*): where there is a terminal.
    """

    def __init__(self, console: Console, total: float, done: float, bar: Progress | None) -> None:
        self.console, self.total, self.done, self.bar = console, total, done, bar
        self.began, self.before = time.monotonic(), done
        self.task = bar.add_task("", total=total, completed=int(done), left="") if bar else None

    def skip(self, work: float) -> None:
        """Something was finished before this run."""
        self.done += work
        self.before += work

    def told(self, text: str, work: float, seconds: float) -> None:
        """Something is finished."""
        self.done += work
        spent, own = time.monotonic() - self.began, self.done - self.before
        left = f"about {duration(spent / own * (self.total - self.done))} left" if own else ""
        percent = f"{100 * self.done / self.total:3.0f} %" if self.total else ""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, description=text, left=left)
        else:
            self.console.print(Text(f"[{percent}] {text} ({duration(seconds)}; {left})"), soft_wrap=True)


@contextmanager
def counting(console: Console, total: float, done: float) -> Iterator[Counter]:
    """A [`Counter`] over the whole grid."""
    if not console.is_terminal:
        yield Counter(console, total, done, None)
        return
    columns = (BarColumn(), "{task.percentage:>3.0f} %", TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        yield Counter(console, total, done, bar)
