"""`task: preference`: a causal language model on pairs of answers, with [`RPOTrainer`]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import RunError, refused_as_run
from ..models import load_model, load_tokenizer, with_adapter
from ..recipe import Model, Recipe
from ..settings import Settings


__all__ = ["Preference"]

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True, kw_only=True)
class Preference(Recipe):
    """`ref_model`: what the policy is compared with, in the dtype of `model` unless it has its own. `None`: the model
    with its adapter off, log-probs of the data, or the model at the start (`train.precompute_reference`)."""

    TASK: ClassVar[str] = "preference"
    COLUMNS: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    OPTIONAL_COLUMNS: ClassVar[tuple[str, ...]] = ("prompt", *REFERENCE, "tools", "chat_template_kwargs")
    PEFT_TYPE: ClassVar[str] = "CAUSAL_LM"
    ARGUMENTS: ClassVar[str] = "hf_reg.rpo_trainer:RPOConfig"

    ref_model: Model | None = None

    def models(self) -> dict[str, str]:
        computed = "the model with its adapter off, log-probs that the data brings, or the model at the start"
        return {**super().models(), "reference": self.ref_model.name if self.ref_model else computed}

    def make_trainer(self, settings: Settings, data: Mapping[str, Any]) -> Any:
        from transformers import AutoModelForCausalLM

        from ...rpo_trainer import RPOTrainer

        whole = settings.adapter is None
        stored = set(REFERENCE) <= set(data["train"].column_names) or settings.args.precompute_reference
        if whole and self.ref_model is None and not stored:
            raise RunError(
                "the whole model is trained, so no reference is left of it. Give ref_model (a name; perhaps that of "
                f"model), an adapter, train: {{precompute_reference: true}}, or data with {' and '.join(REFERENCE)}."
            )
        tokenizer = load_tokenizer(self.model)
        model = load_model(AutoModelForCausalLM, self.model, whole)
        reference = None
        if self.ref_model is not None:
            dtype = {} if self.ref_model.dtype else {"dtype": model.dtype}
            reference = load_model(AutoModelForCausalLM, self.ref_model, False, **dtype)
        model = with_adapter(model, settings.adapter)
        with refused_as_run("the run cannot start"):
            return RPOTrainer(
                model, settings.args, train_dataset=data["train"], eval_dataset=data.get("eval"),
                processing_class=tokenizer, ref_model=reference,
            )  # fmt: skip
