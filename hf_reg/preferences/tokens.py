"""Token ids of a preference pair, and where they are cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..base import check_choice


__all__ = ["TRUNCATION_MODES", "check_tokenizer", "cut", "tokenize_pair"]

TRUNCATION_MODES = ("keep_start", "keep_end")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise unless `tokenizer` is one of text, with tokens to pad and to end with."""
    if tokenizer is None:
        raise ValueError("Preference data needs a tokenizer, found none. Pass processing_class=tokenizer.")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"{type(tokenizer).__name__} is no tokenizer; preference data is text here. Pass processor.tokenizer."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no eos_token, with which answers end. Set tokenizer.eos_token to the "
            "token that ends the model's answers."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no pad_token. Set one: tokenizer.pad_token = tokenizer.eos_token is safe "
            "here, since masks say what is padding."
        )


def _ids(tokenizer: Any, text: Any, **arguments: Any) -> list[int]:
    if isinstance(text, str):
        return tokenizer(text=text)["input_ids"]
    return tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **arguments)["input_ids"]


def _common(*sequences: Sequence[int]) -> int:
    """How many tokens all begin with."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({one[i] for one in sequences}) > 1), shortest)


def tokenize_pair(
    tokenizer: Any, prompt: Any, chosen: Any, rejected: Any, row: Mapping[str, Any]
) -> tuple[dict[str, list[int]], list[int]]:
    """Ids of the prompt and of what follows it in prompt + answer, tokenized together, as generation would see it.

    Plain answers end with the tokenizer's EOS, conversations as the chat template ends them. Where the prompt's own
    tokens are not what prompt + answer begins with (tokens that merge, templates that change), both answers begin at
    the first difference.

    Args:
        row (mapping): `tools` (a list, or JSON) and `chat_template_kwargs` of it go to the chat template.

    Returns:
        `(dict, list)`: `prompt_ids`, `chosen_ids`, `rejected_ids`; and the tokens of the prompt alone that were lost.
    """
    if isinstance(prompt, str):
        end = tokenizer.eos_token
        whole = [prompt + (answer if answer.endswith(end) else answer + end) for answer in (chosen, rejected)]
        alone, one, other = (_ids(tokenizer, text) for text in (prompt, *whole))
    else:
        tools = row.get("tools")
        settings = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        settings |= row.get("chat_template_kwargs") or {}
        alone = _ids(tokenizer, prompt, add_generation_prompt=True, **settings)
        one, other = (_ids(tokenizer, prompt + answer, **settings) for answer in (chosen, rejected))
    length = min(_common(alone, one), _common(alone, other))
    ids = {"prompt_ids": alone[:length], "chosen_ids": one[length:], "rejected_ids": other[length:]}
    return ids, alone[length:]


def cut(
    prompt: Sequence[int], answer: Sequence[int], max_length: int | None, mode: str
) -> tuple[Sequence[int], Sequence[int]]:
    """Prompt and answer within `max_length` tokens together.

    Args:
        mode (`str`): `"keep_start"` drops the end of the answer, `"keep_end"` the start of the prompt.
    """
    check_choice("cut", "mode", mode, TRUNCATION_MODES)
    over = 0 if max_length is None else len(prompt) + len(answer) - max_length
    if over <= 0:
        return prompt, answer
    if mode == "keep_end":
        return prompt[over:], answer[max(over - len(prompt), 0) :]
    return prompt[:max_length], answer[: max(len(answer) - over, 0)]
