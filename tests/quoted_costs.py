"""The costs that `hf-reg methods NAME` and the cards show are lines of the benchmark's results.

`python -m tests.quoted_costs` quotes them anew after `make bench`.
"""

from __future__ import annotations

import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
COSTS, RESULTS = ROOT / "hf_reg" / "costs.md", ROOT / "tests" / "benchmarks" / "results.md"


def key(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip("|").split("|")[:4])


def requote(costs: str, results: str) -> str:
    """`costs` with the values and the first paragraph of `results`."""
    found = re.search(r"Written by `make bench`: (.*?)\n\n", results, re.DOTALL)
    assert found, "the results do not begin as expected"
    lines = {key(line): line for line in results.splitlines() if line.startswith("|")}
    _, _, table = costs.partition("\n\n|")
    body = "".join(f"{lines[key(line)]}\n" for line in f"|{table}".splitlines())
    return f"Measured with {found[1]}\n\n{body}"


if __name__ == "__main__":
    COSTS.write_text(requote(COSTS.read_text(), RESULTS.read_text()))
