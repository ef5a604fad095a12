"""SORSA: a step of a language model, against PEFT's LoRA of the same rank and targets; and its penalty's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, SorsaConfig, get_regularized_peft_model
from hf_reg.penalties import orthonormality

from .balora import BATCH, LENGTH, base, training_step
from .timing import Row, interleave, memory_rows, ratio


PEER = "PEFT LoRA"
TARGETS = {16: 1.10, 128: 1.20}  # of the default mode, by rank
MEMORY = 1.05


def trained(model: torch.nn.Module) -> Callable[[], Any]:
    """A step of our trainer: with the adapter's decoupled step after the optimizer's, where it has one."""
    args = RegularizedTrainingArguments("unused", learning_rate=1e-6, report_to=[], use_cpu=True)
    trainer = RegularizedTrainer(model=model, args=args)
    step = training_step(trainer)

    def run() -> None:
        step()
        trainer._around.on_optimizer_step(trainer.args, trainer.state, trainer.control, optimizer=trainer.optimizer)

    return run


def authors_penalty(matrices: list[torch.Tensor]) -> None:
    """Autograd through the norm, as the authors write it."""
    terms = []
    for matrix in matrices:
        short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        terms.append(torch.norm(short @ short.T - torch.eye(len(short))))
    torch.stack(terms).sum().backward()


def run(rounds: int) -> list[Row]:
    rows = []
    for rank, target in TARGETS.items():
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        ours = {
            "SORSA": SorsaConfig(r=rank, task_type="CAUSAL_LM", orthonormality="off"),
            "SORSA and its decoupled step": SorsaConfig(r=rank, task_type="CAUSAL_LM"),
            "SORSA, folded": SorsaConfig(r=rank, task_type="CAUSAL_LM", orthonormality="off", folded=True),
        }
        steps = {PEER: trained(get_peft_model(base(), lora))}
        steps |= {name: trained(get_regularized_peft_model(base(), config)) for name, config in ours.items()}
        times = interleave(steps, min(rounds, 9), f"SORSA step {BATCH} x {LENGTH}, r = {rank}")
        case = f"56M step, {BATCH} x {LENGTH}, r = {rank}"
        targets = dict(zip(ours, (target, target, 1.0), strict=True))
        for name, wanted in targets.items():
            middle, spread = ratio(times, name, PEER)
            rows.append(Row("SORSA", case, name, PEER, middle, wanted, spread=spread))
        for row in memory_rows("SORSA", case, steps, tuple(ours)):
            rows.append(Row(row.section, row.case, row.ours, row.peer, row.ratio, MEMORY))
    matrices = [torch.linalg.qr(torch.randn(2048, 128)).Q.T.contiguous().requires_grad_() for _ in range(28)]
    forms = {
        "closed form": lambda: torch.stack([orthonormality(matrix) for matrix in matrices]).sum().backward(),
        "autograd through norm()": lambda: authors_penalty(matrices),
    }
    times = interleave(forms, rounds, "orthonormality with its gradient")
    middle, spread = ratio(times, *forms)
    rows.append(Row("SORSA", "penalty and gradient, 28 of 128 x 2048", *forms, middle, 0.8, spread=spread))
    return rows
