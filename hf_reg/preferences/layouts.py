"""How the tokens of a batch of pairs are laid out for a model: padded rows, or every prompt once for both answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..seams.segments import Segment, table
from .data import REFERENCE


__all__ = ["Layout", "model_inputs", "padded", "together"]

NOT_FORWARDED = {"chosen_lengths", "completion_mask", "labels", *REFERENCE}


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch goes into a model."""
    return {key: value for key, value in batch.items() if key not in NOT_FORWARDED}


@dataclass(frozen=True)
class Layout:
    """A batch as a model is given it, and where its answers are then found.

    Args:
        inputs (`dict`): of the model's forward.
        answers (`Callable`): takes the states (R, W, ...) of all positions and returns those (M, ...) that predict the
            M tokens of answers, row by row of the padded batch.
    """

    inputs: dict[str, Any]
    answers: Callable[[torch.Tensor], torch.Tensor]


def padded(batch: Mapping[str, torch.Tensor]) -> Layout:
    """Rows of prompt and answer, as [`PreferenceCollator`] made them."""
    mask = batch["completion_mask"][:, 1:].bool()
    before = slice(-mask.shape[1] - 1, -1)  # what predicts; prompt tuning puts positions in front
    return Layout(model_inputs(batch), lambda states: states[:, before][mask])


class _Part(NamedTuple):
    """Tokens from `begin` to `end` of a row of the padded batch, which go on from the first `shared` of another."""

    row: int
    begin: int
    end: int
    other: int = 0
    shared: int = 0


def _parts(batch: Mapping[str, torch.Tensor]) -> list[list[_Part]] | None:
    """The parts of each pair: prompt and chosen answer, then the rejected one; `None` where rows are not filled up on
    the right. One question to the device."""
    ids, attended, answers = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    count = len(ids) // 2
    ends, column = attended.sum(1), torch.arange(ids.shape[1], device=ids.device)
    starts = ends - answers.sum(1)
    usual = (attended == (column < ends[:, None])) & (answers == ((column >= starts[:, None]) & (attended == 1)))
    equal = (ids[:count] == ids[count:]) | (column >= starts[:count, None])
    same = equal.all(1) & (starts[:count] == starts[count:])
    *rows, straight = torch.cat([starts, ends, same.long(), usual.all()[None].long()]).tolist()
    if not straight:
        return None
    starts_of, ends_of, sames = rows[: 2 * count], rows[2 * count : 4 * count], rows[4 * count :]
    pairs = []
    for chosen in range(count):
        rejected, shared = chosen + count, starts_of[chosen] * sames[chosen]
        first = _Part(chosen, 0, ends_of[chosen])
        pairs.append([first, _Part(rejected, shared, ends_of[rejected], chosen, shared)])
    return pairs


def _place(
    batch: Mapping[str, torch.Tensor], rows: Sequence[Sequence[_Part]], mask: Callable[..., torch.Tensor]
) -> Layout:
    """The parts of each of `rows` behind one another, with the positions that they have in the padded batch."""
    ids, answers = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    height, length = ids.shape
    width = max(sum(part.end - part.begin for part in row) for row in rows)
    source = torch.zeros(len(rows), width, dtype=torch.long)  # the token of each place, filled up with the first one
    place = torch.zeros(height, length, dtype=torch.long)  # the place of each token
    segments: list[list[Segment]] = [[] for _ in rows]
    for index, row in enumerate(rows):
        free = 0
        for part in row:
            size, column = part.end - part.begin, torch.arange(part.begin, part.end)
            source[index, free : free + size] = part.row * length + column
            place[part.row, part.begin : part.end] = index * width + free + torch.arange(size)
            place[part.row, : part.shared] = place[part.other, : part.shared]
            first = int(place[part.row, 0]) - index * width if part.shared else 0
            segments[index].append(Segment(size, (first, first + part.shared)))
            free += size
    source, place = source.to(ids.device, non_blocking=True), place.to(ids.device, non_blocking=True)
    predictors = place[:, :-1][answers]
    inputs = {
        "input_ids": ids.flatten()[source],
        "position_ids": source % length,
        "attention_mask": mask(segments, width, ids.device),
    }
    return Layout(inputs, lambda states: states.flatten(0, 1)[predictors])


def _block_mask(segments: list[list[Segment]], width: int, device: torch.device) -> torch.Tensor:
    """Which place sees which, (R, 1, W, W) bool; a place without a token sees itself."""
    mask = torch.eye(width, dtype=torch.bool).repeat(len(segments), 1, 1, 1)
    for row, found in zip(mask[:, 0], segments, strict=True):
        free = 0
        for length, (first, last) in found:
            own = slice(free, free + length)
            row[own, own] = torch.ones(length, length, dtype=torch.bool).tril()
            row[own, first:last] = True
            free += length
    return mask.to(device, non_blocking=True)


def together(
    batch: Mapping[str, torch.Tensor], in_segments: bool = False, dtype: torch.dtype | None = None
) -> Layout | None:
    """Every prompt once for both of its answers, where the two rows of a pair begin with the same one.

    Args:
        in_segments (`bool`, *optional*, defaults to `False`):
            All pairs in one row without padding, for [`~hf_reg.seams.segments.attend`]; else a row a pair, and a
            block mask.
        dtype (`torch.dtype`, *optional*):
            For a block mask that is added to attention scores; `None`: a mask of `bool`.

    Returns:
        [`Layout`], or `None` for a batch that is not filled up on the right.
    """
    pairs = _parts(batch)
    if pairs is None:
        return None
    if in_segments:
        return _place(batch, [[part for pair in pairs for part in pair]], lambda rows, *_: table(rows[0]))
    layout = _place(batch, pairs, _block_mask)
    if dtype is not None:
        seen = layout.inputs["attention_mask"]
        added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        layout.inputs["attention_mask"] = added.masked_fill_(~seen, torch.finfo(dtype).min)
    return layout
