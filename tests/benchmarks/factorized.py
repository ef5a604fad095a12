"""Patches at weights: factorized layers against dense ones, and what the arctangent of the weight compander costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_reg import patch_model
from hf_reg.patches.factorized import Factorized
from hf_reg.seams.factors import FactorizedLayer
from hf_reg.seams.reparameterized import reparameterize

from .steps import minilm, step
from .timing import Row, interleave, memory_rows, ratio


NAMES = {0.25: "factorized", 0.5: "factorized, rank 0.5", 0.125: "factorized, rank 0.125"}
FFN = {0.5: 0.9, 0.25: 0.6, 0.125: 0.45}  # target of a step of the FFN alone, by rank
MODEL = {0.5: 1.05, 0.25: 0.85}  # and of the whole model


def ffn_step(rank: float | None, tokens: int = 2048) -> Callable[[], Any]:
    """Forward and backward of MiniLM's FFN, 384 to 1536 and back."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384))
    for layer in [layer for layer in layers if rank is not None and isinstance(layer, nn.Linear)]:
        patch = Factorized(rank=rank or 0)
        reparameterize(layer, FactorizedLayer, patch, patch.initial(layer, layer.weight.detach()))
    states, upstream = torch.randn(tokens, 384, requires_grad=True), torch.randn(tokens, 384)

    def run() -> None:
        layers(states).backward(upstream)
        layers.zero_grad()

    return run


def run(rounds: int) -> list[Row]:
    rows = []
    steps = {"dense": ffn_step(None)} | {NAMES[rank]: ffn_step(rank) for rank in FFN}
    times = interleave(steps, rounds, "factorized FFN")
    for rank, target in FFN.items():
        middle, spread = ratio(times, NAMES[rank], "dense")
        case = "FFN 384 - 1536 - 384, forward and backward, 2048 tokens"
        rows.append(Row("factorized", case, NAMES[rank], "dense", middle, target, spread=spread))
    models = {"unpatched": minilm()} | {NAMES[rank]: patch_model(minilm(), "factorized", rank=rank) for rank in MODEL}
    models |= {"weight_compander": patch_model(minilm(), "weight_compander")}
    steps = {name: step(model, 16, 128) for name, model in models.items()}
    times = interleave(steps, rounds, "factorized step 16 x 128")
    targets = {NAMES[rank]: target for rank, target in MODEL.items()}
    for name, target in (targets | {"weight_compander": 1.03}).items():
        section = "factorized" if name in targets else "weight_compander"
        middle, spread = ratio(times, name, "unpatched")
        rows.append(Row(section, "MiniLM step, 16 x 128", name, "unpatched", middle, target, spread=spread))
    memory = memory_rows("factorized", "MiniLM step, 16 x 128", steps, (*targets, "weight_compander"))
    return [*rows, *(row for row in memory if row.peer == "unpatched" and row.ours in targets)] + [
        Row("weight_compander", row.case, row.ours, row.peer, row.ratio, None)
        for row in memory if row.ours == "weight_compander" and row.peer == "unpatched"
    ]  # fmt: skip
