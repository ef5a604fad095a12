"""The preset of a strong weight decay: what it sets, what it says, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from hf_reg import RegularizedTrainer
from hf_reg.optimizers import strong_weight_decay

from ..distributed.heads import make, rows
from ..test_trainer import arguments
from .said import said


def test_it_is_what_the_optimizer_does(tmp_path: Path) -> None:
    args = arguments(folder=tmp_path, learning_rate=1e-3, max_steps=1, lr_scheduler_type="constant")
    with said() as lines:
        assert strong_weight_decay(args) == {"weight_decay": 3.0}
    assert "loses 0.003 of itself a step" in lines[0] and "0.3% over the run" in lines[0]
    model = make("classes/bert")
    table = model.bert.embeddings.word_embeddings.weight
    unused = sorted(set(range(len(table))) - {int(i) for row in rows("classes/bert") for i in row["input_ids"]})
    before = table.detach()[unused].clone()
    RegularizedTrainer(model=model, args=args, train_dataset=rows("classes/bert")).train()
    assert before.any() and torch.allclose(table[unused], before * (1 - 1e-3 * 3.0), atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "times", "text"),
    [
        ({"optim": "sgd"}, 30.0, "optim='sgd' is not known to decay as AdamW does"),
        ({"optim": "adafactor"}, 30.0, "optim='adafactor'"),
        ({"weight_decay": 0.01}, 30.0, r"say 0.01\. Leave it out there, or give times=0.1"),
        ({"learning_rate": 0.2}, 30.0, "times weight_decay=3 is 0.6"),
        ({}, 0.5, "times=0.5 is out of range"),
    ],
)
def test_refusals_change_nothing(settings: dict[str, Any], times: float, text: str) -> None:
    args = arguments(**settings)
    before = args.weight_decay
    with pytest.raises(ValueError, match=text):
        strong_weight_decay(args, times=times)
    assert args.weight_decay == before
    with pytest.raises(TypeError, match="expects TrainingArguments, got dict"):
        strong_weight_decay({})  # type: ignore[arg-type]


def test_plain_arguments_and_again() -> None:
    args = arguments(TrainingArguments)
    strong_weight_decay(args, times=16)
    assert args.weight_decay == pytest.approx(1.6)
    assert strong_weight_decay(args, times=16) == {"weight_decay": args.weight_decay}
