"""`task: token-classification`: a tag for each word."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..data import TextData
from ..errors import RunError, refused_as_run
from ..metrics import Outputs, ScoredRecipe, class_scores, likeliest, scoring
from ..models import check_length, class_config, load_fast_tokenizer, load_model, with_adapter, word_prefix
from ..recipe import Recipe
from ..settings import Settings


__all__ = ["TokenClassification", "tag_names"]

logger = logging.getLogger("transformers.hf_reg")

IGNORED = -100  # of the loss: further pieces of a word, special tokens, padding


def _element(rows: Any, column: str, key: str) -> Any:
    """The feature of the elements of a column of lists."""
    inner = getattr(rows.features[column], "feature", None)
    if inner is None and isinstance(rows.features[column], list):
        inner = rows.features[column][0]
    if inner is None:
        kind = getattr(rows.features[column], "dtype", "something else")
        raise RunError(f"data.{key}: the column {column!r} holds {kind}; expected a list for each row.")
    return inner


def _checked(rows: Any, key: str) -> Any:
    """The rows that have words.

    Raises:
        [`RunError`]: for columns of another kind, and for a row with more or fewer tags than words.
    """
    words, tags = _element(rows, "tokens", key), _element(rows, "tags", key)
    if getattr(words, "dtype", None) not in ("string", "large_string"):
        raise RunError(f"data.{key}: the column 'tokens' holds lists of {words}; expected lists of words.")
    if not getattr(tags, "dtype", "a list").startswith(("int", "uint", "string", "large_string")):
        raise RunError(f"data.{key}: the column 'tags' holds lists of {tags}; expected texts or integers.")
    for index, (one, its) in enumerate(zip(rows["tokens"], rows["tags"], strict=True)):
        if one is None or its is None or len(one) != len(its) or None in one or None in its:
            found = "none" if one is None or its is None else f"{len(one)} tokens and {len(its)} tags"
            raise RunError(f"data.{key}: row {index} has {found}; expected a tag for each token, and none missing.")
    left = rows.filter(len, input_columns=["tokens"])
    if not len(left):
        raise RunError(f"data.{key}: all {len(rows)} rows are without tokens.")
    if len(left) < len(rows):
        logger.warning(f"data.{key}: {len(rows) - len(left)} of {len(rows)} rows have no tokens and are left out.")
    return left


def tag_names(data: Mapping[str, Any]) -> list[Any]:
    """The tags of the training data, in order: of `ClassLabel`s all, of others what occurs.

    Raises:
        [`RunError`]: if there is one only, or a tag occurs in the evaluation alone.
    """
    occurring = {key: sorted({tag for tags in rows["tags"] for tag in tags}) for key, rows in data.items()}
    names = getattr(_element(data["train"], "tags", "train"), "names", None)
    found = occurring["train"] if names is None else list(range(len(names)))
    if len(found) < 2:
        raise RunError(f"data.train: the column 'tags' holds one tag, {found[0]!r}; expected two or more.")
    new = [tag for tag in occurring.get("eval", ()) if tag not in found]
    if new or ("eval" in data and getattr(_element(data["eval"], "tags", "eval"), "names", None) != names):
        which = f"the tag {new[0]!r}" if new else "other tag names"
        raise RunError(f"data.eval has {which}, which data.train has not. Tags: {', '.join(map(str, found))}.")
    return found


@dataclass(frozen=True, kw_only=True)
class TokenClassification(ScoredRecipe):
    """The columns `tokens` (a list of words) and `tags` (as many texts, integers or `ClassLabel`s). A word of several
    pieces is learned, and scored, at its first one. The metrics are over words: entities are not put together."""

    TASK: ClassVar[str] = "token-classification"
    COLUMNS: ClassVar[tuple[str, ...]] = ("tokens", "tags")
    PEFT_TYPE: ClassVar[str] = "TOKEN_CLS"
    LOSS: ClassVar[str] = "cross-entropy of each word's tag"
    PACKAGES: ClassVar[Mapping[str, str]] = {"datasets": "datasets", "sklearn": "scikit-learn"}

    data: TextData = field(metadata=Recipe.__dataclass_fields__["data"].metadata)

    def make_trainer(self, settings: Settings, data: Mapping[str, Any]) -> Any:
        from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

        from ...trainer import RegularizedTrainer

        data = {key: _checked(rows, key) for key, rows in data.items()}
        tags = tag_names(data)
        tokenizer = load_fast_tokenizer(self.model)
        own = getattr(_element(data["train"], "tags", "train"), "names", None)
        config, ids = class_config(self.model, tags, own)
        names = [config.id2label[index] for index in range(len(ids))]
        every = [list(range(len(ids)))]
        further = self.further_scores(settings.args, Outputs(every, every, names))
        model = load_model(AutoModelForTokenClassification, self.model, settings.adapter is None, config=config)
        check_length(self.data.max_tokens, tokenizer, model)
        encoded = self._encoded(settings.args, data, tokenizer, ids)

        def outputs(found: Any) -> Outputs:
            scored = [true != IGNORED for true in found.label_ids]
            parts = (found.predictions, found.label_ids)
            predictions, references = (
                [one[mask].tolist() for one, mask in zip(part, scored, strict=True)] for part in parts
            )
            return Outputs(predictions, references, names)

        model = with_adapter(model, settings.adapter)
        with refused_as_run("the run cannot start"):
            return RegularizedTrainer(
                model, settings.args, train_dataset=encoded["train"], eval_dataset=encoded.get("eval"),
                processing_class=tokenizer, data_collator=DataCollatorForTokenClassification(tokenizer),
                compute_metrics=scoring(outputs, class_scores, further), preprocess_logits_for_metrics=likeliest,
            )  # fmt: skip

    def _encoded(self, args: Any, data: Mapping[str, Any], tokenizer: Any, ids: Mapping[Any, int]) -> dict[str, Any]:
        prefix = word_prefix(tokenizer)

        def encode(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
            given = {"truncation": True, "max_length": self.data.max_tokens, "is_split_into_words": True}
            found = tokenizer([[prefix + word for word in words] for words in rows["tokens"]], **given)
            labels, lost = [], []
            for index, tags in enumerate(rows["tags"]):
                words = found.word_ids(index)
                first = [word is not None and word != before for word, before in zip(words, [None, *words])]  # noqa: B905
                labels.append([ids[tags[w]] if new else IGNORED for w, new in zip(words, first, strict=True)])
                lost.append(len(tags) - sum(first))
            return {**found, "labels": labels, "lost": lost}

        encoded = {}
        for key, rows in data.items():
            with args.main_process_first(desc=f"tokens of data.{key}"), refused_as_run(f"tokens of data.{key}"):
                found = rows.map(encode, batched=True, remove_columns=rows.column_names)
            if lost := sum(found["lost"]):
                logger.warning(
                    f"data.{key}: {lost} words are beyond data.max_tokens ({self.data.max_tokens}) or have no piece: "
                    "they are neither learned nor scored."
                )
            encoded[key] = found.remove_columns("lost")
        return encoded
