"""Tiny trainings, one of each kind, and their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, SorsaConfig, get_regularized_peft_model
from hf_reg.schedules import v_shape

from ..preferences import models
from ..preferences.words import PLAIN


IDS = torch.arange(5, 15)
ROWS = [{"input_ids": IDS + i, "labels": torch.tensor(i % 2)} for i in range(8)]
TURNS = [{"input_ids": IDS + i, "labels": IDS + i} for i in range(8)]
FIXED = {
    "max_steps": 3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "report_to": [], "use_cpu": True,
    "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3,
}  # fmt: skip


def arguments(folder: Path, **settings: Any) -> RegularizedTrainingArguments:
    return RegularizedTrainingArguments(str(folder), **{**FIXED, **settings})


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}  # numpy's own float


def spread(model: Any, inputs: Any, outputs: Any) -> torch.Tensor:
    return outputs.logits.var()


def tlm(folder: Path, model: Any = None, **settings: Any) -> RegularizedTrainer:
    trainer = RegularizedTrainer(
        model=bert() if model is None else model, args=arguments(folder, **settings), train_dataset=ROWS,
        eval_dataset=ROWS, compute_metrics=accuracy,
        patches={"tlm": {"rate": 0.2, "schedule": v_shape(warmup=0.2)}},
        penalties={"l2_sp": 0.01, "spread": (0.1, spread)},
    )  # fmt: skip
    trainer.train()
    return trainer


def sorsa(folder: Path) -> RegularizedTrainer:
    model = get_regularized_peft_model(models.llama(), SorsaConfig(r=4, task_type="CAUSAL_LM"))
    trainer = RegularizedTrainer(model=model, args=arguments(folder), train_dataset=TURNS, eval_dataset=TURNS)
    trainer.train()
    return trainer


def rpo(folder: Path) -> Any:
    trainer = models.trainer(folder, beta=0.1, eta=0.2, max_steps=2, eval_dataset=PLAIN)
    trainer.train()
    trainer.evaluate()
    return trainer


RUNS = {"tlm": tlm, "sorsa": sorsa, "rpo": rpo}
