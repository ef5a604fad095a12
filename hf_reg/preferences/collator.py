"""Preference pairs as one batch: chosen answers first, rejected ones below, padded on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..base import check_choice, check_range
from .data import REFERENCE, TOKENS
from .tokens import TRUNCATION_MODES, cut


__all__ = ["PreferenceCollator"]


class PreferenceCollator:
    """Makes one batch of the pairs that [`prepare_preferences`] gave: `B` pairs are `2 B` rows, the chosen ones first.

    Args:
        pad_token_id (`int`): what rows are filled up with; masked everywhere.
        max_length (`int`, *optional*): most tokens of a row; `None`: no limit.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`): see [`cut`].
        pad_to_multiple_of (`int`, *optional*): fill rows up to a multiple of this length.

    A batch holds `chosen_lengths` `(B,)`, `input_ids`, `attention_mask` and `completion_mask` `(2 B, T)`, all
    `torch.int64`; `ref_chosen_logps` and `ref_rejected_logps` `(B,)` fp32 where the rows have them. An answer's
    length is the number of its tokens that something predicts: all, unless there is no prompt.
    """

    def __init__(
        self,
        pad_token_id: int,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        check_choice("PreferenceCollator", "truncation_mode", truncation_mode, TRUNCATION_MODES)
        if pad_to_multiple_of is not None:
            check_range("PreferenceCollator", "pad_to_multiple_of", pad_to_multiple_of, 1, float("inf"))
        self.pad_token_id, self.max_length = pad_token_id, max_length
        self.truncation_mode, self.multiple = truncation_mode, pad_to_multiple_of or 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        prompt = TOKENS[0]
        rows = [
            cut(example[prompt], example[name], self.max_length, self.truncation_mode)
            for name in TOKENS[1:]
            for example in examples
        ]
        longest = max(len(start) + len(answer) for start, answer in rows)
        width = -(-longest // self.multiple) * self.multiple
        ids = torch.full((len(rows), width), self.pad_token_id)
        attended, answers = torch.zeros_like(ids), torch.zeros_like(ids)
        for index, (start, answer) in enumerate(rows):
            begin, end = len(start), len(start) + len(answer)
            ids[index, :begin], ids[index, begin:end] = torch.as_tensor(start), torch.as_tensor(answer)
            attended[index, :end] = 1
            answers[index, begin:end] = 1
        batch = {"chosen_lengths": answers[: len(examples), 1:].sum(1)}  # first: its rows are pairs, which are counted
        batch |= {"input_ids": ids, "attention_mask": attended, "completion_mask": answers}
        for name in REFERENCE:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        if "example_ids" in examples[0]:
            batch["example_ids"] = torch.tensor([example["example_ids"] for example in examples])
        return batch
