"""What test_processes.py launches: the same step on every way to share it out."""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .models import llama, lora, trainer
from .words import PLAIN


CASES = list(product(("lora", "full"), ("cumulative", "average"), (1, 4), (False, True)))


def step(
    folder: Path, kind: str, variant: str, parts: int, checkpointing: bool
) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, float]]:
    """How far one step of SGD moves each parameter, what it logs, and an evaluation of seven pairs."""
    model = llama(2) if kind == "full" else lora(moved=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    size = len(PLAIN) // parts // int(os.environ.get("WORLD_SIZE", "1"))
    made = trainer(
        folder, model, ref_model=llama(3) if kind == "full" else None, beta=0.3, eta=0.5, variant=variant,
        per_device_train_batch_size=size, gradient_accumulation_steps=parts, train_sampling_strategy="sequential",
        gradient_checkpointing=checkpointing, eval_dataset=PLAIN[:7], per_device_eval_batch_size=2,
        penalties={"l2_sp": 0.01} if kind == "full" else None,
    )  # fmt: skip
    if parts == 1:
        made.evaluate()  # as many do, to see where a run starts
    made.train()
    after = made.evaluate()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters() if p.requires_grad}
    kept = ("loss", "rewards/", "logps/", "eval_rewards", "eval_logps", "eval_loss")
    logged: dict[str, Any] = next(one for one in made.state.log_history if "loss" in one)
    return moved, *({key: v for key, v in one.items() if key.startswith(kept)} for one in (logged, after))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    results = {case: step(target, *case) for case in CASES}
    if os.environ["RANK"] == "0":
        torch.save(results, target / "steps.pt")
