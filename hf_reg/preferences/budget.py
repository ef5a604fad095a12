"""Batches of as many pairs as a budget of tokens allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from ..base import check_range
from .data import TOKENS
from .tokens import cut


__all__ = ["TokenBudgetSampler", "pair_sizes"]

OPEN = 64  # batches that are filled side by side


def pair_sizes(pairs: Sequence[dict[str, Any]], max_length: int | None, mode: str, shared: bool) -> list[int]:
    """Tokens of each pair as it is laid out: its prompt once if it is `shared` by both answers, or else twice."""
    sizes = []
    for pair in pairs:
        (one, chosen), (other, rejected) = (cut(pair[TOKENS[0]], pair[name], max_length, mode) for name in TOKENS[1:])
        once = shared and len(one) == len(other)
        sizes.append(len(one) + len(chosen) + len(rejected) + (0 if once else len(other)))
    return sizes


class TokenBudgetSampler(Sampler[list[int]]):
    """Puts pairs into batches of up to `budget` tokens, at random; their order is another one in each epoch.

    Which pairs are together is settled once, so that every epoch has the same number of batches. Pairs are taken in
    random order, each into the fullest of the batches begun that has room for it.

    Args:
        sizes (sequence of `int`): tokens of each pair.
        budget (`int`): most tokens of a batch.
        seed (`int`, *optional*, defaults to 0): of the order.
        processes (`int`, *optional*, defaults to 1):
            How many take batches in turn: some are halved so that all have as many and none is repeated.

    Raises:
        `ValueError`: for a pair of more tokens than the budget.
    """

    def __init__(self, sizes: Sequence[int], budget: int, seed: int = 0, processes: int = 1) -> None:
        check_range("RPOConfig", "max_tokens_per_batch", budget, 1, float("inf"))
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        if sizes[largest] > budget:
            raise ValueError(
                f"Pair {largest} has {sizes[largest]} tokens, max_tokens_per_batch is {budget}. Raise it, or lower "
                "max_length."
            )
        self.seed, self.epoch = seed, 0
        generator = torch.Generator().manual_seed(seed)
        begun: list[tuple[int, list[int]]] = []  # tokens, pairs; the fullest first
        self.batches: list[list[int]] = []
        for index in torch.randperm(len(sizes), generator=generator).tolist():
            room = (place for place, (used, _) in enumerate(begun) if used + sizes[index] <= budget)
            used, batch = begun.pop(place) if (place := next(room, None)) is not None else (0, [])
            begun.append((used + sizes[index], [*batch, index]))
            begun.sort(key=lambda one: -one[0])
            if len(begun) > OPEN:
                self.batches.append(begun.pop(0)[1])
        self.batches += [batch for _, batch in begun]
        while len(self.batches) % processes and len(longest := max(self.batches, key=len)) > 1:
            self.batches.remove(longest)
            self.batches += [longest[::2], longest[1::2]]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for index in torch.randperm(len(self.batches), generator=generator).tolist():
            yield self.batches[index]
