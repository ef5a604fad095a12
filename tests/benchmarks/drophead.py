"""DropHead: multiplying, and skipping with sliced projections, against the unpatched model."""

from __future__ import annotations

from hf_reg import patch_model

from .steps import minilm, step
from .timing import Row, interleave, memory_rows, ratio


TARGETS = {"multiply": 1.01, "skip, p -> 0": 1.02}
SKIP = {128: {0.2: 0.96, 0.5: 0.85}, 512: {0.2: 0.94, 0.5: 0.78}}


def run(rounds: int) -> list[Row]:
    rows = []
    for batch, length in ((16, 128), (8, 512)):
        variants = {
            "unpatched": minilm(),
            "multiply": patch_model(minilm(), "drophead", p=0.2),
            "skip, p -> 0": patch_model(minilm(), "drophead", p=1e-9, skip=True, granularity="batch"),
        }
        for p in SKIP[length]:
            variants[f"skip, p = {p}"] = patch_model(minilm(), "drophead", p=p, skip=True, granularity="batch")
        steps = {name: step(model, batch, length) for name, model in variants.items()}
        times = interleave(steps, rounds, f"DropHead step {batch} x {length}")
        targets = TARGETS | {f"skip, p = {p}": target for p, target in SKIP[length].items()}
        case = f"MiniLM step, {batch} x {length}"
        for ours, target in targets.items():
            middle, spread = ratio(times, ours, "unpatched")
            rows.append(Row("DropHead", case, ours, "unpatched", middle, target, spread=spread))
        rows += memory_rows("DropHead", case, steps, tuple(targets))
    return rows
