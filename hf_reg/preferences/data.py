"""A whole data set of preferences as token ids; what cannot be learned from is counted, and said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..base import check_choice
from ..messages import say
from .rows import Unusable, read_row
from .tokens import TRUNCATION_MODES, check_tokenizer, cut, tokenize_pair


__all__ = ["REFERENCE", "TOKENS", "PreferencePairs", "check_limits", "prepare_preferences"]

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


class PreferencePairs(list):
    """Pairs as token ids, the `limits` (max_length, max_prompt_length, truncation_mode) they were checked with, and
    which row of the data each pair was (`row_numbers`)."""

    def __init__(
        self,
        pairs: Iterable[dict[str, Any]],
        limits: tuple[int | None, int | None, str],
        row_numbers: Sequence[int],
    ) -> None:
        super().__init__(pairs)
        self.limits, self.row_numbers = limits, row_numbers

    @property
    def stores_reference(self) -> bool:
        """Whether they bring the reference's log-probs."""
        return bool(self) and REFERENCE[0] in self[0]


def check_limits(max_length: int | None, max_prompt_length: int | None, mode: str) -> None:
    check_choice("prepare_preferences", "truncation_mode", mode, TRUNCATION_MODES)
    for name, value, least in (("max_length", max_length, 2), ("max_prompt_length", max_prompt_length, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name}={value!r} is out of range; give an integer of at least {least}, or None.")
    if max_length is not None and max_prompt_length is not None and max_prompt_length >= max_length:
        raise ValueError(
            f"max_prompt_length={max_prompt_length} leaves no room for an answer within max_length={max_length}. Give "
            "a smaller one."
        )


def _check_room(ids: Mapping[str, list[int]], max_length: int | None, mode: str) -> bool:
    """Whether anything is cut; raises [`Unusable`] for a pair that has nothing to learn once it is."""
    kept = [cut(ids["prompt_ids"], ids[name], max_length, mode) for name in TOKENS[1:]]
    for prompt, answer in kept:
        if not answer:
            raise Unusable("an answer truncated away: the prompt fills max_length")
        if ids["prompt_ids"] and not prompt:
            raise Unusable("an answer that fills max_length and leaves no prompt")
        if len(prompt) + len(answer) < 2:
            raise Unusable("an answer of one token without a prompt, which nothing predicts")
    if kept[0] == kept[1]:
        raise Unusable("identical answers once truncated")
    return any(len(answer) < len(ids[name]) for name, (_, answer) in zip(TOKENS[1:], kept, strict=True))


def _reference(row: Mapping[str, Any], where: str) -> dict[str, float]:
    given = [name for name in REFERENCE if row.get(name) is not None]
    if len(given) == 1:
        raise ValueError(f"{where}: {given[0]} without its partner; expected {' and '.join(REFERENCE)}, or neither.")
    return {name: float(row[name]) for name in given}


def prepare_preferences(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_start",
    name: str = "preferences",
) -> PreferencePairs:
    """Token ids of pairs of answers, plain or conversational. Several pairs of one prompt are several rows.

    Rows that hold `prompt_ids`, `chosen_ids` and `rejected_ids` already are taken as they are. A log message counts
    the rows that are left out, by reason: empty and identical answers, and pairs of which truncation leaves nothing.

    Args:
        rows (iterable of mappings): with `chosen`, `rejected` and, unless both begin with it, `prompt`; optional
            `ref_chosen_logps` and `ref_rejected_logps` (`float`): log-probs of the reference, summed over the answer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): with EOS and padding token.
        max_length (`int`, *optional*): most tokens of prompt + answer, see [`cut`]; `None`: no limit.
        max_prompt_length (`int`, *optional*): most tokens of the prompt; `None`: no limit of its own.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`): which end is kept: `"keep_start"` of prompt
            and answer, `"keep_end"` of the prompt, which gives way to the answer.
        name (`str`, *optional*, defaults to `"preferences"`): what messages call the data.

    Returns:
        [`PreferencePairs`], a `list` of `dict`: ids as `numpy.int32` arrays, answers still whole
        ([`PreferenceCollator`] cuts them), and the reference's log-probs where they are given.

    Raises:
        `ValueError`: for a missing column, a tokenizer without the tokens or the chat template that are needed, limits
        out of range, or no usable row. `TypeError`: for a cell that is neither text nor turns.
    """
    check_limits(max_length, max_prompt_length, truncation_mode)
    check_tokenizer(tokenizer)
    prepared: list[dict[str, Any]] = []
    row_numbers: list[int] = []
    left_out: Counter[str] = Counter()
    shorter = count = lost = 0
    for count, row in enumerate(rows, start=1):
        where = f"{name}, row {count - 1}"
        try:
            ids, tail = _token_ids(row, tokenizer, where)
            if max_prompt_length is not None and len(ids["prompt_ids"]) > max_prompt_length:
                end = truncation_mode == "keep_end"
                part = slice(-max_prompt_length, None) if end else slice(max_prompt_length)
                ids["prompt_ids"] = ids["prompt_ids"][part]
            shorter += _check_room(ids, max_length, truncation_mode)
        except Unusable as reason:
            left_out[str(reason)] += 1
            continue
        lost += bool(tail)
        arrays = {key: np.asarray(value, dtype=np.int32) for key, value in ids.items()}
        prepared.append(arrays | _reference(row, where))
        row_numbers.append(count - 1)
    _say(name, count, left_out, shorter, lost)
    if not prepared:
        reasons = "; ".join(f"{number} with {reason}" for reason, number in left_out.most_common())
        raise ValueError(f"{name}: no usable pair in {count} rows{': ' if reasons else ''}{reasons}.")
    given = {tuple(sorted(set(REFERENCE) & set(row))) for row in prepared}
    if len(given) > 1:
        raise ValueError(f"{name}: only some rows hold {' and '.join(REFERENCE)}. Give them in all rows, or in none.")
    return PreferencePairs(prepared, (max_length, max_prompt_length, truncation_mode), row_numbers)


def _token_ids(row: Any, tokenizer: Any, where: str) -> tuple[dict[str, list[int]], list[int]]:
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} is {type(row).__name__}; expected a mapping with 'prompt', 'chosen', 'rejected'.")
    if all(key in row for key in TOKENS):
        ids = {key: list(map(int, row[key])) for key in TOKENS}
        if not ids["chosen_ids"] or not ids["rejected_ids"]:
            raise Unusable("an empty answer")
        return ids, []
    prompt, chosen, rejected = read_row(row, where)
    if isinstance(prompt, list) and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{where} is a conversation, but {type(tokenizer).__name__} has no chat template. Set "
            "tokenizer.chat_template, or give strings."
        )
    ids, tail = tokenize_pair(tokenizer, prompt, chosen, rejected, row)
    if not ids["chosen_ids"] or not ids["rejected_ids"]:
        raise Unusable("an empty answer")
    if ids["chosen_ids"] == ids["rejected_ids"]:
        raise Unusable("identical answers")
    return ids, tail


def _say(name: str, count: int, left_out: Counter[str], shorter: int, lost: int) -> None:
    if left_out:
        reasons = "; ".join(f"{number} with {reason}" for reason, number in left_out.most_common())
        say(f"{name}: {sum(left_out.values())} of {count} rows are left out: {reasons}.")
    if shorter:
        say(f"{name}: answers of {shorter} of {count} rows are cut to fit max_length.")
    if lost:
        say(
            f"{name}: in {lost} of {count} rows the tokens of the prompt alone are not what prompt + answer begins "
            "with; the answers begin where they differ. End prompts on a token boundary, or mend the chat template."
        )
