"""The trainer: what it adds to a step of the plain one, and whose gradient is the whole batch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments

from ..distributed.heads import ROWS, expected, gradients
from .steps import minilm, trainer_step
from .timing import Row, interleave, memory_rows, ratio


VARIANTS: dict[str, Any] = {
    "no penalty": None,
    "l2_sp": {"l2_sp": 0.01},
    "confidence": {"confidence": 0.1},
    "r_drop": {"r_drop": 1.0},
}


def training_step(trainer: transformers.Trainer, batch: int, length: int) -> Callable[[], Any]:
    """A whole optimizer step of a trainer on a fixed random batch, without its data loader."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(1000, 20000, (batch, length), generator=generator),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
        "labels": torch.randint(0, 5, (batch,), generator=generator),
    }
    return trainer_step(trainer, inputs)


def run(rounds: int) -> list[Row]:
    rows = []
    common: dict[str, Any] = {"learning_rate": 1e-6, "report_to": [], "use_cpu": True}
    for batch, length in ((16, 128),):
        plain = transformers.Trainer(model=minilm(), args=transformers.TrainingArguments("unused", **common))
        steps = {"Trainer": training_step(plain, batch, length)}
        for name, penalties in VARIANTS.items():
            ours = RegularizedTrainer(
                model=minilm(), args=RegularizedTrainingArguments("unused", **common), penalties=penalties
            )
            steps[name] = training_step(ours, batch, length)
        times = interleave(steps, rounds, f"trainer step {batch} x {length}")
        case = f"MiniLM step, {batch} x {length}"
        for name in VARIANTS:
            middle, spread = ratio(times, name, "Trainer")
            target = 1.01 if name == "no penalty" else None
            rows.append(Row("trainer", case, name, "Trainer", middle, target, spread=spread))
        rows += memory_rows("trainer", case, steps, tuple(VARIANTS))
    for head in ("classes/bert", "classes/llama", "tokens/bert", "tokens/llama"):
        whole = torch.nn.utils.get_total_norm(list(expected(head).values()))
        for trainer, target in ((transformers.Trainer, None), (RegularizedTrainer, 1.000001)):
            found = gradients(head, ROWS // 4, 4, trainer=trainer)[0]
            norm = torch.nn.utils.get_total_norm(list(found.values()))
            case = f"gradient of {head}, 4 micro-batches"
            rows.append(Row("trainer", case, trainer.__name__, "whole batch", float(norm / whole), target))
    return rows
