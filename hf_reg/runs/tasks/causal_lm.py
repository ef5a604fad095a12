"""`task: causal-lm`: a causal language model on texts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..data import TextData, with_text
from ..errors import RunError, refused_as_run
from ..models import check_length, load_model, load_tokenizer, with_adapter
from ..recipe import Recipe
from ..settings import Settings


__all__ = ["CausalLM"]

logger = logging.getLogger("transformers.hf_reg")


@dataclass(frozen=True, kw_only=True)
class CausalLM(Recipe):
    """Every row of the column `text` (or line of a .txt file) is an example; every token of it is learned."""

    TASK: ClassVar[str] = "causal-lm"
    COLUMNS: ClassVar[tuple[str, ...]] = ("text",)
    PEFT_TYPE: ClassVar[str] = "CAUSAL_LM"
    LOSS: ClassVar[str] = "cross-entropy of the next token"

    data: TextData = field(metadata=Recipe.__dataclass_fields__["data"].metadata)

    def make_trainer(self, settings: Settings, data: Mapping[str, Any]) -> Any:
        from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

        from ...trainer import RegularizedTrainer

        tokenizer = load_tokenizer(self.model)
        model = load_model(AutoModelForCausalLM, self.model, settings.adapter is None)
        check_length(self.data.max_tokens, tokenizer, model)
        encoded = self._encoded(settings.args, with_text(data), tokenizer)
        model = with_adapter(model, settings.adapter)
        with refused_as_run("the run cannot start"):
            return RegularizedTrainer(
                model, settings.args, train_dataset=encoded["train"], eval_dataset=encoded.get("eval"),
                processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer),
            )  # fmt: skip

    def _encoded(self, args: Any, data: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        def encode(rows: Mapping[str, list[str]]) -> dict[str, Any]:
            ids = tokenizer(rows["text"], truncation=True, max_length=self.data.max_tokens)["input_ids"]
            return {"input_ids": ids, "labels": ids}

        encoded = {}
        for key, rows in data.items():
            with args.main_process_first(desc=f"tokens of data.{key}"):
                found = rows.map(encode, batched=True, remove_columns=rows.column_names)
                encoded[key] = found.filter(lambda ids: len(ids) > 1, input_columns=["input_ids"])
            if not len(encoded[key]):
                raise RunError(f"data.{key}: every text is a single token, so there is none to predict.")
            if lost := len(found) - len(encoded[key]):
                logger.warning(f"data.{key}: {lost} of {len(found)} texts are a single token and left out.")
        return encoded

    def further_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        loss = metrics["eval_loss"]
        return {"eval_perplexity": math.exp(loss) if loss < 700 else math.inf}
