"""`task: sequence-classification`: one label for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..data import TextData, with_text
from ..errors import RunError, refused_as_run
from ..metrics import Outputs, ScoredRecipe, class_scores, likeliest, scoring
from ..models import check_length, class_config, load_model, load_tokenizer, with_adapter
from ..recipe import Recipe
from ..settings import Settings


__all__ = ["SequenceClassification"]


def label_names(data: Mapping[str, Any]) -> list[Any]:
    """The labels of the training data, in order: of a `ClassLabel` its names, of others what occurs.

    Raises:
        [`RunError`]: for labels that are missing, are no classes, or occur in the evaluation alone.
    """
    feature = data["train"].features["label"]
    if hasattr(feature, "names"):
        found = list(range(len(feature.names)))
    else:
        found = _labels(data["train"], "train")
    if len(found) < 2:
        raise RunError(f"data.train: the column 'label' holds one class, {found[0]!r}; expected two or more.")
    if "eval" in data:
        new = [label for label in _labels(data["eval"], "eval") if label not in found]
        if new or getattr(data["eval"].features["label"], "names", None) != getattr(feature, "names", None):
            which = f"the label {new[0]!r}" if new else "other label names"
            raise RunError(f"data.eval has {which}, which data.train has not. Labels: {', '.join(map(str, found))}.")
    return found


def _labels(rows: Any, key: str) -> list[Any]:
    kind = getattr(rows.features["label"], "dtype", "a list")
    if not kind.startswith(("int", "uint", "string", "large_string", "bool")):
        raise RunError(f"data.{key}: the column 'label' holds {kind}; expected texts or integers, one class each.")
    found = rows.unique("label")
    if None in found:
        raise RunError(f"data.{key}: row {rows['label'].index(None)} has no label. Give it one, or leave it out.")
    return sorted(found)


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(ScoredRecipe):
    """The columns `text` (and `text_pair`) and `label`: texts, integers or a `ClassLabel`. Their number is that of the
    classes, their names go into the model's configuration."""

    TASK: ClassVar[str] = "sequence-classification"
    COLUMNS: ClassVar[tuple[str, ...]] = ("text", "label")
    OPTIONAL_COLUMNS: ClassVar[tuple[str, ...]] = ("text_pair",)
    PEFT_TYPE: ClassVar[str] = "SEQ_CLS"
    LOSS: ClassVar[str] = "cross-entropy of the label"
    PACKAGES: ClassVar[Mapping[str, str]] = {"datasets": "datasets", "sklearn": "scikit-learn"}

    data: TextData = field(metadata=Recipe.__dataclass_fields__["data"].metadata)

    def make_trainer(self, settings: Settings, data: Mapping[str, Any]) -> Any:
        from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

        from ...trainer import RegularizedTrainer

        pair = "text_pair" in data["train"].column_names
        columns = ["text", "text_pair"] if pair else ["text"]
        data = with_text(data, columns)
        labels = label_names(data)
        tokenizer = load_tokenizer(self.model)
        config, ids = class_config(self.model, labels, getattr(data["train"].features["label"], "names", None))
        names = [config.id2label[index] for index in range(len(ids))]
        every = list(range(len(ids)))
        further = self.further_scores(settings.args, Outputs(every, every, names))
        model = load_model(AutoModelForSequenceClassification, self.model, settings.adapter is None, config=config)
        if model.config.get_text_config().pad_token_id is None:  # where it ends a text, models look for the last token
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        check_length(self.data.max_tokens, tokenizer, model)

        def outputs(found: Any) -> Outputs:
            return Outputs(found.predictions.tolist(), found.label_ids.tolist(), names)

        def encode(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
            texts = [rows[column] for column in columns]
            encoded = tokenizer(*texts, truncation=True, max_length=self.data.max_tokens)
            return {**encoded, "labels": [ids[label] for label in rows["label"]]}

        encoded = {}
        for key, rows in data.items():
            with settings.args.main_process_first(desc=f"tokens of data.{key}"):
                encoded[key] = rows.map(encode, batched=True, remove_columns=rows.column_names)
        model = with_adapter(model, settings.adapter)
        with refused_as_run("the run cannot start"):
            return RegularizedTrainer(
                model, settings.args, train_dataset=encoded["train"], eval_dataset=encoded.get("eval"),
                processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer),
                compute_metrics=scoring(outputs, class_scores, further), preprocess_logits_for_metrics=likeliest,
            )  # fmt: skip
