"""What test_processes.py launches: the same step on every way to share it out."""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from hf_reg.distributed import whole

from .models import llama, lora, trainer
from .words import PLAIN


CASES = list(product(("lora", "full"), ("cumulative", "average"), (1, 4), (False, True)))
SHARDED = list(product(("lora", "full"), ("cumulative",), (1,), (False, True)))
BUDGET = {"max_tokens_per_batch": 120, "gradient_accumulation_steps": 32, "max_steps": -1, "num_train_epochs": 1}


def step(
    folder: Path, kind: str, variant: str, parts: int, checkpointing: bool, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, float]]:
    """How far one step of SGD moves each parameter, what it logs, and an evaluation of seven pairs."""
    model = lora(moved=0.1) if kind == "lora" else llama(2)
    fixed: dict[str, Any] = {"precompute_reference": kind == "start", "beta": 0.3, "eta": 0.5}  # else llama(3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    size = len(PLAIN) // parts // int(os.environ.get("WORLD_SIZE", "1"))
    fixed |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
    made = trainer(
        folder, model, ref_model=llama(3) if kind == "full" else None, variant=variant,
        train_sampling_strategy="sequential", gradient_checkpointing=checkpointing, eval_dataset=PLAIN[:7],
        per_device_eval_batch_size=2, penalties={"l2_sp": 0.01} if kind == "full" else None, **{**fixed, **settings},
    )  # fmt: skip
    assert "fsdp" not in settings or made.is_fsdp_enabled
    if parts == 1 and "fsdp" not in settings:
        made.evaluate()  # as many do, to see where a run starts
    made.train()
    after = made.evaluate()
    moved = {name: whole(p.detach()) - before[name] for name, p in model.named_parameters() if p.requires_grad}
    kept = ("loss", "rewards/", "logps/", "eval_rewards", "eval_logps", "eval_loss")
    logged: dict[str, Any] = next(one for one in made.state.log_history if "loss" in one)
    return moved, *({key: v for key, v in one.items() if key.startswith(kept)} for one in (logged, after))


if __name__ == "__main__":
    target, fsdp = Path(sys.argv[1]), "--fsdp2" in sys.argv
    more: dict[str, Any] = {}
    if fsdp:
        from ..distributed.fsdp_on_cpu import FSDP2

        more = FSDP2 | {"fsdp_config": FSDP2["fsdp_config"] | {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    results = {case: step(target, *case, **more) for case in (SHARDED if fsdp else CASES)}
    if fsdp:  # what runs before the model is sharded must not be held on to
        results["start"] = step(target, "start", "cumulative", 1, False, **more)
    else:
        results["budget"] = step(target, "lora", "cumulative", 2, False, **BUDGET)
    if os.environ["RANK"] == "0":
        torch.save(results, target / "steps.pt")
