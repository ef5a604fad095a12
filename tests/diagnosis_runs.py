"""Tiny runs of `Trainer` and `RegularizedTrainer`, with what `diagnose` has to find planted in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BertForSequenceClassification, TrainingArguments

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments


STEPS, LENGTH, VOCABULARY = 60, 12, 64
BERT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 3,
    "vocab_size": VOCABULARY,
}  # fmt: skip


def bert(dropout: float = 0.1) -> BertForSequenceClassification:
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(AutoConfig.for_model("bert", **BERT, **rates))


def rows(labels: str, count: int = 48) -> list[dict[str, torch.Tensor]]:
    """Of `"noise"`, which can only be learned by heart; of a `"signal"`, the first token; or a `"weak"` one, which one
    row in four contradicts."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        ids, label = torch.randint(13, VOCABULARY, (LENGTH,), generator=generator), torch.tensor(index % 3)
        if labels == "noise":
            label = torch.randint(0, 3, (), generator=generator)
        else:
            ids[:6] = 10 + label
        if labels == "weak" and index % 4 == 3:
            label = (label + 1) % 3
        found.append({"input_ids": ids, "labels": label})
    return found


def trained(
    folder: Path, labels: str, model: nn.Module | None = None, trainer: type = RegularizedTrainer,
    settings: dict[str, Any] | None = None, **arguments: Any,
) -> Any:  # fmt: skip
    """A run that left its last checkpoint in `folder`."""
    kind = RegularizedTrainingArguments if issubclass(trainer, RegularizedTrainer) else TrainingArguments
    given: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 48, "learning_rate": 1e-3,
        "logging_steps": 2,
        "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": STEPS // 2,
        "save_only_model": True, "report_to": [], "use_cpu": True, "disable_tqdm": True, "log_level": "error",
    }  # fmt: skip
    data = rows(labels, 72)
    made = trainer(
        model=model or bert(), args=kind(str(folder), **given | arguments), train_dataset=data[:24],
        eval_dataset=data[24:], **settings or {},
    )  # fmt: skip
    made.train()
    return made


class Evaluating(RegularizedTrainer):
    """A loop of one's own that leaves the model in evaluation mode."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        model.eval()
        return super().compute_loss(model, *args, **kwargs)


def without_dropout(model: nn.Module) -> nn.Module:
    """Its modules at rate 0, its configuration as it was."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
