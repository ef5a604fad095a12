"""`task: causal-lm`: a causal language model on texts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..data import TextData, with_text
from ..errors import RecipeError, RunError, refused_as_run
from ..models import check_length, load_model, load_tokenizer, with_adapter
from ..recipe import Recipe
from ..settings import Settings


__all__ = ["CausalLM"]

PROMPT = "{prompt}"
IGNORED = -100  # of the loss

logger = logging.getLogger("transformers.hf_reg")


def _predicted(labels: list[int]) -> bool:
    """Whether there is a token to predict: the first one never is."""
    return any(label != IGNORED for label in labels[1:])


@dataclass(frozen=True)
class PromptData(TextData):
    """Texts, perhaps after prompts.

    Args:
        template (`str`, *optional*): what stands around a prompt, which is put where it says `{prompt}`.
        end (`bool`, *optional*, defaults to `False`): whether examples end with the token that ends texts.
    """

    template: str | None = None
    end: bool = False

    def check(self, where: str) -> None:
        super().check(where)
        if self.template is not None and self.template.count(PROMPT) != 1:
            raise RecipeError(f"{where}.template: found {self.template!r}; write {PROMPT} once, where prompts go.")


@dataclass(frozen=True, kw_only=True)
class CausalLM(Recipe):
    """Every row of the column `text` (or line of a .txt file) is an example, of which every token is learned. A
    column `prompt` that the recipe names (`data.columns`, `data.template`) stands before it, and is not learned."""

    TASK: ClassVar[str] = "causal-lm"
    COLUMNS: ClassVar[tuple[str, ...]] = ("text",)
    OPTIONAL_COLUMNS: ClassVar[tuple[str, ...]] = ("prompt",)
    PEFT_TYPE: ClassVar[str] = "CAUSAL_LM"
    LOSS: ClassVar[str] = "cross-entropy of the next token"

    data: PromptData = field(metadata=Recipe.__dataclass_fields__["data"].metadata)

    def make_trainer(self, settings: Settings, data: Mapping[str, Any]) -> Any:
        from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

        from ...trainer import RegularizedTrainer

        tokenizer = load_tokenizer(self.model)
        model = load_model(AutoModelForCausalLM, self.model, settings.adapter is None)
        check_length(self.data.max_tokens, tokenizer, model)
        encoded = self._encoded(settings.args, self._texts(data), tokenizer)
        model = with_adapter(model, settings.adapter)
        with refused_as_run("the run cannot start"):
            return RegularizedTrainer(
                model, settings.args, train_dataset=encoded["train"], eval_dataset=encoded.get("eval"),
                processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer),
            )  # fmt: skip

    @property
    def prompted(self) -> bool:
        """Whether texts have prompts: where `data.columns` names them, or there is a template for them."""
        return "prompt" in self.data.columns or self.data.template is not None

    def _texts(self, data: Mapping[str, Any]) -> dict[str, Any]:
        if not self.prompted:
            return with_text(data)
        if wrong := next((key for key, rows in data.items() if "prompt" not in rows.column_names), None):
            raise RunError(
                f"data.{wrong}: there is no column 'prompt'. Name yours: data: {{columns: {{prompt: YOURS}}}}."
            )
        return with_text(data, ("prompt", "text"))

    def _encoded(self, args: Any, data: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        most, template = self.data.max_tokens, self.data.template or PROMPT
        if self.data.end and tokenizer.eos_token is None:
            raise RunError(f"data.end: the tokenizer of {self.model.name} has no eos_token. Leave it out.")
        last = [tokenizer.eos_token_id] if self.data.end else []

        def encode(rows: Mapping[str, list[str]]) -> dict[str, Any]:
            before: list[list[int]] = [[] for _ in rows["text"]]
            if self.prompted:
                before = tokenizer([template.replace(PROMPT, prompt) for prompt in rows["prompt"]])["input_ids"]
            given = {"truncation": True, "max_length": most, "add_special_tokens": not self.prompted}
            texts = [text + last for text in tokenizer(rows["text"], **given)["input_ids"]]
            pairs = list(zip(before, texts, strict=True))
            return {
                "input_ids": [(prompt + text)[:most] for prompt, text in pairs],
                "labels": [([IGNORED] * len(prompt) + text)[:most] for prompt, text in pairs],
            }

        why = f"{{}} is beyond data.max_tokens ({most})" if self.prompted else "{} is a single token"
        encoded = {}
        for key, rows in data.items():
            with args.main_process_first(desc=f"tokens of data.{key}"):
                found = rows.map(encode, batched=True, remove_columns=rows.column_names)
                encoded[key] = found.filter(_predicted, input_columns=["labels"])
            if not len(encoded[key]):
                raise RunError(f"data.{key}: {why.format('every text')}, so there is none to predict.")
            if lost := len(found) - len(encoded[key]):
                logger.warning(f"data.{key}: {lost} of {len(found)} texts: {why.format('it')}; left out.")
        return encoded

    def further_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        loss = metrics["eval_loss"]
        return {"eval_perplexity": math.exp(loss) if loss < 700 else math.inf}
