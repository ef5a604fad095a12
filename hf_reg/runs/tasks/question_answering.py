"""`task: question-answering`: the answer to a question, as a span of a context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..answers import Window, best_answer, exact_match, f1
from ..data import TextData, with_text
from ..errors import RecipeError, RunError, refused_as_run
from ..metrics import Outputs, ScoredRecipe, scoring
from ..models import check_length, load_fast_tokenizer, load_model, with_adapter
from ..recipe import Recipe
from ..settings import Settings


__all__ = ["QuestionAnswering"]

TRIAL = Outputs(["a b", ""], [["a b", "b"], []], answers=[
    {"text": ["a b", "b"], "answer_start": [0, 2]}, {"text": [], "answer_start": []}
])  # fmt: skip
EXPECTED = "{text: [...], answer_start: [...]}, of the same length"


@dataclass(frozen=True)
class ContextData(TextData):
    """Contexts that are longer than `max_tokens` with their question are cut into several that overlap.

    Args:
        max_tokens (`int`, *optional*, defaults to 384): of question and context together.
        stride (`int`, *optional*, defaults to 128): tokens that two cuts share.
        n_best (`int`, *optional*, defaults to 20): starts and ends of a cut that are tried for an answer.
        max_answer_tokens (`int`, *optional*, defaults to 30): of an answer that is found.
        no_answer (`bool`, *optional*, defaults to `False`): whether questions may have none, as in SQuAD 2.
    """

    max_tokens: int = 384
    stride: int = 128
    n_best: int = 20
    max_answer_tokens: int = 30
    no_answer: bool = False

    def check(self, where: str) -> None:
        super().check(where)
        for key, least in {"stride": 0, "n_best": 1, "max_answer_tokens": 1}.items():
            if getattr(self, key) < least:
                raise RecipeError(f"{where}.{key}: {getattr(self, key)} is out of range; give {least} or more.")
        if self.stride >= self.max_tokens:
            raise RecipeError(f"{where}.stride: {self.stride} tokens shared of {self.max_tokens}; give fewer.")


def _check_answers(rows: Any, key: str, no_answer: bool) -> None:
    """Raise [`RunError`] for the first answer that is missing or not where it is said to be."""
    for index, (context, answers) in enumerate(zip(rows["context"], rows["answers"], strict=True)):
        whole = isinstance(answers, Mapping) and {"text", "answer_start"} <= set(answers)
        texts, starts = (answers["text"], answers["answer_start"]) if whole else (None, None)
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise RunError(f"data.{key}: row {index} has the answers {answers!r}; expected {EXPECTED}.")
        if not texts and not no_answer:
            raise RunError(f"data.{key}: row {index} has no answer. Leave it out, or set data.no_answer: true.")
        for text, start in zip(texts, starts, strict=True):
            if not text or context[start : start + len(text)] != text:
                raise RunError(
                    f"data.{key}: row {index}: the answer {text!r} is not in the context at {start}; found "
                    f"{context[start : start + len(text or '')]!r}. answer_start counts characters from 0."
                )


def _null(ids: list[int], tokenizer: Any) -> int:
    """Where a cut points that does not hold the answer: at the token that classifies, or else the first one."""
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token is not None and token in ids:
            return ids.index(token)
    return 0


def answers_of(rows: Any, cuts: Any, data: ContextData) -> Callable[[Any], Outputs]:
    """What finds the best spans of all cuts of a context in the model's predictions."""
    owners, offsets, nulls = cuts["row"], cuts["offsets"], cuts["null"]
    contexts, answers = rows["context"], rows["answers"]
    how: dict[str, Any] = {"n_best": data.n_best, "longest": data.max_answer_tokens, "no_answer": data.no_answer}

    def outputs(prediction: Any) -> Outputs:
        windows: dict[int, list[Window]] = {}
        for start, end, owner, places, null in zip(*prediction.predictions, owners, offsets, nulls, strict=True):
            inside = [tuple(place) if place[1] > place[0] else None for place in places]
            windows.setdefault(owner, []).append(Window(start, end, inside, null))
        found = {owner: best_answer(contexts[owner], its, **how) for owner, its in windows.items()}
        true = [answers[owner] for owner in found]
        return Outputs(list(found.values()), [its["text"] for its in true], answers=true)

    return outputs


def answer_scores(outputs: Outputs) -> dict[str, float]:
    """Exact match and F1 in percent, by the definition of SQuAD."""
    pairs = list(zip(outputs.predictions, outputs.references, strict=True))
    return {
        "exact_match": 100 * sum(exact_match(*pair) for pair in pairs) / len(pairs),
        "f1": 100 * sum(f1(*pair) for pair in pairs) / len(pairs),
    }


def _spans(logits: Any, labels: Any) -> Any:
    return logits[:2]


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(ScoredRecipe):
    """The columns `context`, `question` and `answers` of SQuAD. Learned is the first answer of a question, in the cuts
    that hold it whole; the others learn that it is not there. Metrics: exact match and F1, in percent."""

    TASK: ClassVar[str] = "question-answering"
    COLUMNS: ClassVar[tuple[str, ...]] = ("context", "question", "answers")
    PEFT_TYPE: ClassVar[str] = "QUESTION_ANS"
    LOSS: ClassVar[str] = "mean of the cross-entropies of the answer's first and last token"

    data: ContextData = field(metadata=Recipe.__dataclass_fields__["data"].metadata)

    def make_trainer(self, settings: Settings, data: Mapping[str, Any]) -> Any:
        from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

        from ...trainer import RegularizedTrainer

        data = with_text(data, ("context", "question"))
        for key, rows in data.items():
            _check_answers(rows, key, self.data.no_answer)
        further = self.further_scores(settings.args, TRIAL)
        tokenizer = load_fast_tokenizer(self.model)
        tokenizer.padding_side = "right"  # labels and offsets are counted from the left
        model = load_model(AutoModelForQuestionAnswering, self.model, settings.adapter is None)
        check_length(self.data.max_tokens, tokenizer, model)
        cuts = {key: self._cut(settings.args, rows, key, tokenizer) for key, rows in data.items()}
        own = ["row", "offsets", "null"]
        encoded = {key: found.remove_columns(own) for key, found in cuts.items()}
        scores = None
        if "eval" in data:
            outputs = answers_of(data["eval"], cuts["eval"].select_columns(own), self.data)
            scores = scoring(outputs, answer_scores, further)
        model = with_adapter(model, settings.adapter)
        with refused_as_run("the run cannot start"):
            return RegularizedTrainer(
                model, settings.args, train_dataset=encoded["train"], eval_dataset=encoded.get("eval"),
                processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer),
                compute_metrics=scores, preprocess_logits_for_metrics=_spans,
            )  # fmt: skip

    def _cut(self, args: Any, rows: Any, key: str, tokenizer: Any) -> Any:
        """Every cut of every context: its tokens, the place of the answer, and for each token its place in the
        context, (0, 0) outside of it."""
        most, stride, added = self.data.max_tokens, self.data.stride, tokenizer.num_special_tokens_to_add(pair=True)

        def encode(batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, Any]:
            questions = [question.lstrip() for question in batch["question"]]
            lengths = [len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]]
            if most - max(lengths) - added <= stride:
                raise RunError(
                    f"data.{key}: row {indices[lengths.index(max(lengths))]}: a question of {max(lengths)} tokens "
                    f"leaves no room for a context. Give data.max_tokens above {max(lengths) + added + stride}, or a "
                    "smaller data.stride."
                )
            found = tokenizer(
                questions, batch["context"], truncation="only_second", max_length=most, stride=stride,
                return_overflowing_tokens=True, return_offsets_mapping=True,
            )  # fmt: skip
            owners, places = found.pop("overflow_to_sample_mapping"), found.pop("offset_mapping")
            made: dict[str, list[Any]] = {name: [] for name in ("start_positions", "end_positions", "offsets", "null")}
            for index, owner in enumerate(owners):
                parts = found.sequence_ids(index)
                offsets = [tuple(p) if part == 1 else (0, 0) for p, part in zip(places[index], parts, strict=True)]
                null = _null(found["input_ids"][index], tokenizer)
                first, last = _place(offsets, batch["answers"][owner], null)
                for name, value in zip(made, (first, last, offsets, null), strict=True):
                    made[name].append(value)
            return {**found, **made, "row": [indices[owner] for owner in owners]}

        with args.main_process_first(desc=f"tokens of data.{key}"):
            return rows.map(encode, batched=True, with_indices=True, remove_columns=rows.column_names)


def _place(offsets: list[tuple[int, int]], answers: Mapping[str, Any], null: int) -> tuple[int, int]:
    """First and last token of the first answer; `null` for both if this cut does not hold it whole."""
    if not answers["text"]:
        return null, null
    begin = answers["answer_start"][0]
    close = begin + len(answers["text"][0])
    inside = [index for index, (left, right) in enumerate(offsets) if left < right]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < close:
        return null, null
    touched = [index for index in inside if offsets[index][1] > begin and offsets[index][0] < close]
    return (touched[0], touched[-1]) if touched else (null, null)
