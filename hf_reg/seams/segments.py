"""Attention over stretches of tokens laid out one behind the other in a single row, each with a context of its own.

A segment is causal in itself and sees all of its context, the end of which it continues: part of one segment before
it, or nothing. That is the block mask of answers that share a prompt, but no mask is formed: each segment attends to
the keys that it may see, cut out side by side.

What says where the segments are travels through a model in the place of its attention mask, which every mask
function of transformers hands on as it is if it has four dimensions. It is a small table of whole numbers, so that
gradient checkpointing can keep it, and a model that would add it to its scores fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations.sdpa_attention import sdpa_attention_forward


__all__ = ["Segment", "attend", "segments_of", "table"]

MARK = 0x5E67E275  # first cell of a table
_read: Any = WeakIdKeyDictionary()  # tables and their segments, so that a GPU is asked once, not in every layer


class Segment(NamedTuple):
    """`length` tokens, and the place `context` in the row: first and behind the last, equal where there is none."""

    length: int
    context: tuple[int, int] = (0, 0)


def table(segments: Sequence[Segment]) -> torch.Tensor:
    """The segments of a row as a tensor (1, 1, S + 1, 3) of `torch.int64`."""
    return torch.tensor([[[[MARK, len(segments), 0], *([length, *context] for length, context in segments)]]])


def segments_of(mask: Any) -> list[Segment] | None:
    """The segments that a [`table`] says; `None` for any other mask."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.int64 or mask.dim() != 4 or mask.shape[-1] != 3:
        return None
    if mask not in _read:
        (mark, *_), *rows = mask[0, 0].tolist()
        _read[mask] = [Segment(length, (first, last)) for length, first, last in rows] if mark == MARK else None
    return _read[mask]


def _cut(parts: Sequence[torch.Tensor], begins: Sequence[int], context: tuple[int, int]) -> torch.Tensor:
    """What is at the places of `context`, which lie in one of the parts."""
    index = max(index for index, begin in enumerate(begins) if begin <= context[0])
    part = parts[index][:, :, context[0] - begins[index] : context[1] - begins[index]]
    if part.shape[2] != context[1] - context[0]:
        raise ValueError(f"A context from {context[0]} to {context[1]} is not within one segment.")
    return part


def attend(
    function: Callable[..., Any],
    segments: Sequence[Segment],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """`function` of each segment and its context: equal to it with the block mask.

    Args:
        function (`Callable`): the attention function of sdpa.
        segments (sequence of [`Segment`]): one behind the other.
        query, key, value (`torch.Tensor` of shape `(1, H, N, D)`): of the tokens of all segments.

    Returns:
        `tuple`: the output (1, N, H, D), and None for the probabilities.

    Raises:
        `ValueError`: for another attention function, or another number of tokens than the segments have.
    """
    lengths = [segment.length for segment in segments]
    if function is not sdpa_attention_forward:
        raise ValueError("Segments are attended to with sdpa only.")
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == sum(lengths):
        raise ValueError(
            f"{sum(lengths)} tokens in segments; found queries {tuple(query.shape)} and keys {tuple(key.shape)}."
        )
    begins = [sum(lengths[:index]) for index in range(len(lengths))]
    parts = [states.split(lengths, dim=2) for states in (query, key, value)]
    masks: dict[tuple[int, int], torch.Tensor] = {}
    outputs = []
    for q, k, v, (length, context) in zip(*parts, segments, strict=True):
        before, causal = context[1] - context[0], None
        if before:
            k, v = (
                torch.cat([_cut(part, begins, context), own], 2) for part, own in zip(parts[1:], (k, v), strict=True)
            )
            if (length, before) not in masks:
                ones = torch.ones(length, before + length, dtype=torch.bool, device=query.device)
                masks[length, before] = ones.tril(before)[None, None]
            causal = masks[length, before]
        outputs.append(function(module, q, k, v, causal, **kwargs)[0])
    return torch.cat(outputs, dim=1), None
