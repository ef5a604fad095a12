"""Answers as spans of a text: the best ones of a model's scores, and how well they fit, by the definition of SQuAD."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


__all__ = ["Window", "best_answer", "exact_match", "f1", "normalize"]

ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """In lower case, without punctuation, articles and further space: SQuAD's `normalize_answer`."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact_match(found: str, true: Iterable[str]) -> float:
    """1 if `found` is one of the true answers, after [`normalize`]; without any, if it is empty."""
    return float(any(normalize(found) == normalize(one) for one in list(true) or [""]))


def f1(found: str, true: Iterable[str]) -> float:
    """The best F1 of the words that `found` shares with a true answer, after [`normalize`]."""
    return max(_f1(normalize(found).split(), normalize(one).split()) for one in list(true) or [""])


def _f1(found: list[str], true: list[str]) -> float:
    if not found or not true:
        return float(found == true)
    common = sum((Counter(found) & Counter(true)).values())
    return 2 * common / (len(found) + len(true))


@dataclass(frozen=True)
class Window:
    """The scores of one cut of a context.

    Args:
        start, end (array of shape `(T,)`): logits.
        offsets (sequence): for each token its place in the context, `None` for tokens that are not of it.
        null (`int`): index of the token that stands for no answer.
    """

    start: Any
    end: Any
    offsets: Sequence[tuple[int, int] | None]
    null: int


def best_answer(context: str, windows: Sequence[Window], *, n_best: int, longest: int, no_answer: bool) -> str:
    """The span with the highest sum of start and end logit over all cuts of a context.

    Args:
        context (`str`): what the offsets count in.
        windows (sequence of [`Window`]): its cuts.
        n_best (`int`): how many starts and ends of a cut are tried.
        longest (`int`): tokens of an answer, at most.
        no_answer (`bool`): whether "" is an answer: given if its smallest score over the cuts beats every span.

    Returns:
        `str`: the answer; "" also where no span is possible.
    """
    best, text = float("-inf"), ""
    null = float("inf")
    for window in windows:
        size = len(window.offsets)
        start, end = window.start[:size], window.end[:size]
        null = min(null, float(start[window.null] + end[window.null]))
        ends = (-end).argsort(kind="stable")[:n_best]
        for first in (-start).argsort(kind="stable")[:n_best]:
            for last in ends:
                begin, close = window.offsets[first], window.offsets[last]
                if begin is None or close is None or not first <= last < first + longest:
                    continue
                score = float(start[first] + end[last])
                if score > best:
                    best, text = score, context[begin[0] : close[1]]
    return "" if no_answer and null > best else text
