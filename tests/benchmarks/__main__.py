"""`python -m tests.benchmarks [--rounds N]`: run every benchmark, print the table, write results.md beside this
file."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import balora, drophead, sorsa, svd, tlm, trainer
from .timing import Row


RESULTS = Path(__file__).with_name("results.md")
SECTIONS = {module.__name__.rpartition(".")[2]: module for module in (tlm, drophead, trainer, svd, sorsa, balora)}
COLUMNS = ("section", "case", "ours", "peer", "ratio", "quartiles", "target", "met")


def cells(row: Row) -> tuple[str, ...]:
    digits = 0 if row.at_least else 3
    target = "" if row.target is None else f"{'>=' if row.at_least else '<='} {row.target:g}"
    met = {None: "", True: "yes", False: "NO"}[row.met]
    quartiles = f"{row.spread[0]:.{digits}f} to {row.spread[1]:.{digits}f}" if row.spread else ""
    return row.section, row.case, row.ours, row.peer, f"{row.ratio:.{digits}f}", quartiles, target, met


def markdown(rows: list[Row], rounds: int) -> str:
    stack = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        "# Benchmark results",
        "",
        f"Written by `make bench`: {stack}, Python {platform.python_version()}, one thread, CPU clock, {rounds} "
        f"rounds, every",
        "variant once a round in random order. A ratio is the median over the rounds of ours / peer (for the "
        "mask: peer / ours).",
        "Peak memory is what a step allocates above the model, gradients included (with `skip`, of one draw).",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--only", choices=SECTIONS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, module in SECTIONS.items():
        if options.only in (None, name):
            rows += module.run(options.rounds)
    table = Table(title="ratios of this run", title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        table.add_row(*cells(row), style=None if row.met is not False else "bold red")
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if options.only is None:
        RESULTS.write_text(markdown(rows, options.rounds))


if __name__ == "__main__":
    main()
