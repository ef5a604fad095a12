"""One row of preference data as it was written: checked, and its prompt told from its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


__all__ = ["COLUMNS", "Unusable", "is_conversation", "read_row"]

COLUMNS = ("prompt", "chosen", "rejected")


class Unusable(Exception):
    """Why a row that is well formed cannot be learned from; it is counted and left out."""


def is_conversation(cell: Any) -> bool:
    """Whether `cell` is a list of turns: `{"role": ..., "content": ...}`. An empty list counts."""
    return isinstance(cell, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in cell)


def _shared(chosen: Any, rejected: Any) -> int:
    """How much both begin with, in turns or characters, of which each keeps one at least."""
    shortest = min(len(chosen), len(rejected))
    length = next((i for i in range(shortest) if chosen[i] != rejected[i]), max(shortest - 1, 0))
    if isinstance(chosen, str) and length < shortest and length and chosen[length - 1] == " ":
        length -= 1  # a space belongs to the word that follows
    return length


def _check(row: Mapping[str, Any], where: str) -> None:
    missing = [name for name in COLUMNS[1:] if name not in row]
    if missing:
        raise ValueError(
            f"{where}: no column {' and '.join(map(repr, missing))}; found {', '.join(map(repr, row))}. Expected "
            "'prompt', 'chosen' and 'rejected' (the prompt may be implicit): rename yours."
        )
    for name in COLUMNS:
        cell = row.get(name, "")
        if isinstance(cell, str) or is_conversation(cell) or (cell is None and name == "prompt"):
            continue
        answers = isinstance(cell, list) and any(isinstance(one, (str, list)) for one in cell)
        raise TypeError(
            f"{where}: {name!r} is {type(cell).__name__} ({str(cell)[:60]}); expected a string, or a list of turns "
            "{'role': ..., 'content': ...}."
            + (" Several pairs of one prompt are several rows, with the same prompt." if answers else "")
        )


def _is_empty(answer: Any) -> bool:
    if isinstance(answer, str):
        return not answer
    return not any(turn.get("content") or turn.get("tool_calls") for turn in answer)


def read_row(row: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected answer of `row`: three strings, or three lists of turns.

    A prompt that is missing is what both answers begin with (whole turns, or characters). A prompt that is a string
    beside answers that are conversations repeats their first turns, as in UltraFeedback, and is left out.

    Args:
        row (mapping): with `chosen`, `rejected` and, unless it is implicit, `prompt`.
        where (`str`): which row this is, for messages.

    Raises:
        `ValueError`: for a missing column, or answers without a prompt. `TypeError`: for a cell of another kind.
        [`Unusable`]: for an empty answer, and for identical ones.
    """
    _check(row, where)
    chosen, rejected = row["chosen"], row["rejected"]
    turns = isinstance(chosen, list)
    if turns != isinstance(rejected, list):
        kinds = ("a conversation", "a string")
        raise TypeError(
            f"{where}: 'chosen' is {kinds[not turns]} and 'rejected' is {kinds[turns]}; expected two of a kind."
        )
    if _is_empty(chosen) or _is_empty(rejected):
        raise Unusable("an empty answer")
    if chosen == rejected:
        raise Unusable("identical answers")
    prompt = row.get("prompt")
    if prompt is None or (turns and isinstance(prompt, str)):
        length = _shared(chosen, rejected)
        if turns and not length:
            raise ValueError(
                f"{where}: the answers share no first turn that could be the prompt; found {prompt!r} as 'prompt'. "
                "Give the prompt as a list of turns, such as [{'role': 'user', 'content': ...}]."
            )
        return chosen[:length], chosen[length:], rejected[length:]
    if isinstance(prompt, list) and not turns:
        raise TypeError(
            f"{where}: 'prompt' is a conversation and the answers are strings; expected answers such as "
            "[{'role': 'assistant', 'content': ...}]."
        )
    if turns and not prompt:
        raise Unusable("an empty prompt")
    return prompt, chosen, rejected
