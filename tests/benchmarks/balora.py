"""BA-LoRA: a step of a language model with all three penalties, against plain LoRA with the loss of transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from hf_reg import BALoraConfig, RegularizedTrainer, RegularizedTrainingArguments, get_regularized_peft_model
from hf_reg.penalties import Consistency, Diversity, SvdConcentration

from .steps import trainer_step
from .timing import Row, interleave, memory_rows, ratio


BATCH, LENGTH, VOCABULARY = 4, 256, 32_000
PEER = "LoRA, transformers' loss"
TARGETS = {
    "LoRA, fused loss": 1.0,
    "BA-LoRA": 1.5,
    "BA-LoRA, cached teacher": 1.1,
    "BA-LoRA, whole logits": None,
}
MEMORY = 0.8


def base() -> torch.nn.Module:
    """A model of 56M parameters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def lora() -> torch.nn.Module:
    return get_peft_model(base(), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def adapted() -> torch.nn.Module:
    """With an adapter that has moved: at its start it equals the teacher."""
    model = get_regularized_peft_model(base(), BALoraConfig(r=16, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    return model


def examples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, VOCABULARY, (LENGTH,), generator=generator) for _ in range(BATCH)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in tokens]


def penalties() -> list[Any]:
    """BA-LoRA's, without schedules, which leave two of them out of the first steps."""
    return [Consistency(weight=0.025), Diversity(weight=0.005), SvdConcentration(weight=0.005)]


def training_step(trainer: transformers.Trainer) -> Callable[[], Any]:
    """A whole optimizer step of a trainer on the same batch, without its data loader."""
    rows = examples()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    if isinstance(trainer, RegularizedTrainer):
        batch["example_ids"] = torch.arange(BATCH)
    return trainer_step(trainer, batch)


def run(rounds: int) -> list[Row]:
    common: dict[str, Any] = {"learning_rate": 1e-6, "report_to": [], "use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        cached = {"teacher_cache": folder}
        ours: dict[str, tuple[dict[str, Any], list[Any] | None]] = {
            "LoRA, fused loss": ({"fused_loss": True}, None),
            "BA-LoRA": ({}, penalties()),
            "BA-LoRA, cached teacher": (cached, penalties()),
            "BA-LoRA, whole logits": ({"fused_loss": False}, penalties()),
        }
        plain = transformers.Trainer(model=lora(), args=transformers.TrainingArguments("unused", **common))
        steps = {PEER: training_step(plain)}
        for name, (settings, terms) in ours.items():
            args = RegularizedTrainingArguments("unused", **common, **settings)
            steps[name] = training_step(
                RegularizedTrainer(
                    model=adapted() if terms else lora(), args=args, penalties=terms, train_dataset=examples()
                )
            )
        times = interleave(steps, min(rounds, 11), f"BA-LoRA step {BATCH} x {LENGTH}")
        case = f"56M step, {BATCH} x {LENGTH}"
        rows = []
        for name, target in TARGETS.items():
            middle, spread = ratio(times, name, PEER)
            rows.append(Row("BA-LoRA", case, name, PEER, middle, target, spread=spread))
        for row in memory_rows("BA-LoRA", case, steps, tuple(TARGETS)):
            target = MEMORY if row.ours != "BA-LoRA, whole logits" else None
            rows.append(Row(row.section, row.case, row.ours, row.peer, row.ratio, target))
    return rows
