"""`task: seq2seq`: a text to a text, with an encoder-decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

from ..data import TextData, with_text
from ..errors import RecipeError, refused_as_run
from ..metrics import Outputs, ScoredRecipe, scoring
from ..models import check_length, load_model, load_tokenizer, with_adapter
from ..recipe import Recipe
from ..settings import Settings


__all__ = ["Seq2Seq"]

TRIAL = Outputs(["one text", "another"], [["one text"], ["another"]])

logger = logging.getLogger("transformers.hf_reg")


@dataclass(frozen=True)
class PairData(TextData):
    """Pairs of texts: sources are cut after `max_tokens`, targets after `max_target_tokens` (`int`, defaults to 128).

    Args:
        prefix (`str`, *optional*): what stands before every source, such as `"translate English to German: "`.
    """

    max_target_tokens: int = 128
    prefix: str = ""

    def check(self, where: str) -> None:
        super().check(where)
        if self.max_target_tokens < 2:
            raise RecipeError(f"{where}.max_target_tokens: {self.max_target_tokens} is out of range; give 2 or more.")


def texts_of(tokenizer: Any) -> Callable[[Any], Outputs]:
    """What makes texts of generated token ids, and of the true ones."""
    import numpy as np

    def texts(ids: Any) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def outputs(prediction: Any) -> Outputs:
        found = prediction.predictions
        written = texts(found[0] if isinstance(found, tuple) else found)
        return Outputs(written, [[true] for true in texts(prediction.label_ids)])

    return outputs


def translation_scores(outputs: Outputs) -> dict[str, float]:
    """BLEU and chrF of sacrebleu, with its defaults."""
    from sacrebleu import corpus_bleu, corpus_chrf

    wanted = [[true for (true,) in outputs.references]]
    return {
        "bleu": corpus_bleu(outputs.predictions, wanted).score, "chrf": corpus_chrf(outputs.predictions, wanted).score
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(ScoredRecipe):
    """The columns `source` and `target`. With `train.predict_with_generate`, an evaluation also generates, and scores
    the texts with sacrebleu: BLEU and chrF."""

    TASK: ClassVar[str] = "seq2seq"
    COLUMNS: ClassVar[tuple[str, ...]] = ("source", "target")
    PEFT_TYPE: ClassVar[str] = "SEQ_2_SEQ_LM"
    ARGUMENTS: ClassVar[str] = "hf_reg.seq2seq_trainer:RegularizedSeq2SeqTrainingArguments"
    LOSS: ClassVar[str] = "cross-entropy of the target's tokens"

    data: PairData = field(metadata=Recipe.__dataclass_fields__["data"].metadata)

    def check(self, where: str) -> None:
        super().check(where)
        generates = self.train.get("predict_with_generate")
        if generates and find_spec("sacrebleu") is None:
            raise RecipeError(
                "train.predict_with_generate: sacrebleu, which scores generated texts, is not installed: pip install "
                '"hf_reg[train]", or leave it out for the loss alone.'
            )
        if self.metrics and not generates:
            raise RecipeError("metrics: are of generated texts. Set train.predict_with_generate: true.")

    def make_trainer(self, settings: Settings, data: Mapping[str, Any]) -> Any:
        from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

        from ...seq2seq_trainer import RegularizedSeq2SeqTrainer

        further = self.further_scores(settings.args, TRIAL)
        tokenizer = load_tokenizer(self.model)
        model = load_model(AutoModelForSeq2SeqLM, self.model, settings.adapter is None)
        check_length(max(self.data.max_tokens, self.data.max_target_tokens), tokenizer, model)
        encoded = self._encoded(settings.args, with_text(data, self.COLUMNS), tokenizer)
        collator = DataCollatorForSeq2Seq(tokenizer, model)
        generates = getattr(settings.args, "predict_with_generate", False)
        model = with_adapter(model, settings.adapter)
        with refused_as_run("the run cannot start"):
            return RegularizedSeq2SeqTrainer(
                model, settings.args, train_dataset=encoded["train"], eval_dataset=encoded.get("eval"),
                processing_class=tokenizer, data_collator=collator,
                compute_metrics=scoring(texts_of(tokenizer), translation_scores, further) if generates else None,
            )  # fmt: skip

    def _encoded(self, args: Any, data: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        def encode(rows: Mapping[str, list[str]]) -> dict[str, Any]:
            sources = [self.data.prefix + source for source in rows["source"]]
            found = tokenizer(sources, truncation=True, max_length=self.data.max_tokens)
            targets = tokenizer(text_target=rows["target"], truncation=True, max_length=self.data.max_target_tokens)
            return {**found, "labels": targets["input_ids"]}

        encoded = {}
        for key, rows in data.items():
            with args.main_process_first(desc=f"tokens of data.{key}"):
                encoded[key] = rows.map(encode, batched=True, remove_columns=rows.column_names)
            if cut := sum(len(ids) == self.data.max_target_tokens for ids in encoded[key]["labels"]):
                logger.warning(f"data.{key}: {cut} of {len(encoded[key])} targets reach data.max_target_tokens.")
        return encoded
