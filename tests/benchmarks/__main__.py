"""`python -m tests.benchmarks [--only SECTION] [--rounds N]`: run the benchmarks, print the table and, from 15 rounds
on, write it into results.md beside this file."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import balora, companions, drophead, factorized, patches, rpo, sorsa, svd, tlm, trainer
from .timing import Row, keep_freed_memory


RESULTS = Path(__file__).with_name("results.md")
SECTIONS = {
    module.__name__.rpartition(".")[2]: module
    for module in (tlm, drophead, patches, factorized, trainer, companions, svd, sorsa, balora, rpo)
}
COLUMNS = ("section", "case", "ours", "peer", "ratio", "quartiles", "target", "met")


def cells(row: Row) -> tuple[str, ...]:
    digits = 0 if row.at_least else 3
    target = "" if row.target is None else f"{'>=' if row.at_least else '<='} {row.target:g}"
    met = {None: "", True: "yes", False: "NO"}[row.met]
    quartiles = f"{row.spread[0]:.{digits}f} to {row.spread[1]:.{digits}f}" if row.spread else ""
    return row.section, row.case, row.ours, row.peer, f"{row.ratio:.{digits}f}", quartiles, target, met


def written() -> list[str]:
    """The rows of results.md, to keep those of the sections that are not run."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return [line for line in lines if line.startswith("| ") and not line.startswith("| section")]


def markdown(rows: list[Row]) -> str:
    """The table with `rows`; the sections that were not run keep theirs."""
    stack = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    new: dict[str, list[str]] = {}
    for row in rows:
        new.setdefault(row.section, []).append("| " + " | ".join(cells(row)) + " |")
    old: dict[str, list[str]] = {}
    for line in written():
        old.setdefault(line.split(" | ")[0].removeprefix("| "), []).append(line)
    lines = [
        "# Benchmark results",
        "",
        f"Written by `make bench`: {stack}, Python {platform.python_version()}, one thread, CPU clock. Variants run",
        "once a round in random order, and a ratio is the median over the rounds of ours / peer (for the mask: peer /",
        "ours). Each section is from one run, of 15 rounds or more (SORSA, SVD, BA-LoRA and RPO: of 11 or fewer).",
        "The process keeps the memory that it frees (`patches` only; the other sections were run before that was so).",
        "Peak memory is what a step allocates above the model, gradients included (with `skip`, of one draw).",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    return "\n".join([*lines, *(line for part in (old | new).values() for line in part)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--only", choices=SECTIONS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
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
    if options.rounds >= 15:
        RESULTS.write_text(markdown(rows))


if __name__ == "__main__":
    main()
