"""TLM: the mask against the authors' loop, and a training step against no dropout and the default dropout."""

from __future__ import annotations

import random

import torch

from hf_reg import patch_model
from hf_reg.patches.tlm import TLM, TLMGate
from hf_reg.seams.masks import TokenView

from .steps import minilm, step
from .timing import Row, interleave, memory_rows, ratio


REPEATS = 20


def authors_mask(padding: torch.Tensor, rate: float) -> torch.Tensor:
    """The mask of the authors' BERT, written from METHODS 1.1 as they do it: a Python loop over the rows of every
    example."""
    batch, length = padding.shape
    ordinary = padding * torch.bernoulli(torch.full((batch, length), 1 - rate))
    rows = []
    for example in range(batch):
        for i in range(length):
            if ordinary[example, i] != 1:
                row = torch.zeros(length)
                row[i] = 1
                rows.append(row if random.choice(("siblings", "self")) == "siblings" else 1 - row)
            else:
                rows.append(ordinary[example])
    mask = torch.stack(rows).view(batch, 1, length, length)
    return (1.0 - mask) * torch.finfo(mask.dtype).min


def our_masks(gate: TLMGate, batch: int, length: int, times: int) -> None:
    for _ in range(times):  # one at a time, as a layer does: keeping them would measure the allocator
        gate.hide(TokenView(None, batch, length, length, torch.device("cpu")))


def run(rounds: int) -> list[Row]:
    rows = []
    gate = TLMGate(TLM())
    for batch, length in ((16, 128), (8, 512)):
        padding = torch.ones(batch, length)
        times = interleave(
            {
                "loop": lambda p=padding: authors_mask(p, 0.1),
                "ours": lambda b=batch, n=length: our_masks(gate, b, n, REPEATS),
            },
            min(rounds, 11),
            f"TLM mask {batch} x {length}",
        )
        middle, spread = ratio(times, "loop", "ours")
        spread = (spread[0] * REPEATS, spread[1] * REPEATS)
        case = f"mask of a layer, {batch} x {length}"
        rows.append(
            Row("TLM", case, "times faster", "authors' loop", middle * REPEATS, 100, at_least=True, spread=spread)
        )

    for batch, length in ((16, 128), (8, 512)):
        variants = {
            "no dropout": minilm(),
            "TLM": patch_model(minilm(attention_dropout=0.1), "tlm"),
            "HF default": minilm(attention_dropout=0.1),
        }
        if length == 128:
            variants["HF default, eager"] = minilm(attention_dropout=0.1, implementation="eager")
        steps = {name: step(model, batch, length) for name, model in variants.items()}
        times = interleave(steps, rounds, f"TLM step {batch} x {length}")
        case = f"MiniLM step, {batch} x {length}"
        limits = {"no dropout": 1.02, "HF default": 0.6 if length == 512 else 1.0, "HF default, eager": 1.0}
        for peer in [name for name in variants if name != "TLM"]:
            middle, spread = ratio(times, "TLM", peer)
            rows.append(Row("TLM", case, "TLM", peer, middle, limits[peer], spread=spread))
        rows += memory_rows("TLM", case, steps, ("TLM",))
        padded = {name: step(variants[name], batch, length, padding=8) for name in ("no dropout", "TLM")}
        middle, spread = ratio(interleave(padded, rounds, f"TLM padded {batch} x {length}"), "TLM", "no dropout")
        rows.append(Row("TLM", f"{case}, padded", "TLM", "no dropout", middle, 1.02, spread=spread))
    return rows
