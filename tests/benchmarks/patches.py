"""Every other patch at its default against the unpatched model."""

from __future__ import annotations

from hf_reg import patch_model
from hf_reg.patching import known_patches

from .steps import minilm, step
from .timing import Row, interleave, memory_rows, ratio


ELSEWHERE = {"tlm", "drophead", "head_mask"}
MOST = 1.03


def run(rounds: int) -> list[Row]:
    names = [name for name in known_patches() if name not in ELSEWHERE]
    variants = {"unpatched": minilm()} | {name: patch_model(minilm(), name) for name in names}
    rows = []
    case = "MiniLM step, 16 x 128"
    steps = {name: step(model, 16, 128) for name, model in variants.items()}
    times = interleave(steps, rounds, f"patches, {case}")
    for name in names:
        middle, spread = ratio(times, name, "unpatched")
        rows.append(Row("patches", case, name, "unpatched", middle, MOST, spread=spread))
    return rows + memory_rows("patches", case, steps, tuple(names))
