"""What acts beside the optimizer, and StableMax, against the same trainer without."""

from __future__ import annotations

from typing import Any

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments
from hf_reg.optimizers import COMPANIONS, StableMaxLoss

from .steps import minilm
from .timing import Row, interleave, memory_rows, ratio
from .trainer import training_step


CASE, PEER = "MiniLM step, 16 x 128", "RegularizedTrainer"


def run(rounds: int) -> list[Row]:
    common: dict[str, Any] = {"learning_rate": 1e-6, "report_to": [], "use_cpu": True}
    variants: dict[str, dict[str, Any]] = {PEER: {}} | {name: {"companions": name} for name in COMPANIONS}
    variants["gradient_dropout"]["teacher"] = minilm().eval()
    variants["stablemax"] = {"compute_loss_func": None}
    steps = {}
    for name, settings in variants.items():
        model = minilm()
        if "compute_loss_func" in settings:
            settings["compute_loss_func"] = StableMaxLoss(model)
        trainer = RegularizedTrainer(model=model, args=RegularizedTrainingArguments("unused", **common), **settings)
        steps[name] = training_step(trainer, 16, 128)
        for companion in trainer.companions:
            if name != "gradient_dropout":
                companion.attach(trainer.optimizer, model)
    times = interleave(steps, rounds, f"companions, {CASE}")
    rows = []
    for name in list(steps)[1:]:
        middle, spread = ratio(times, name, PEER)
        rows.append(Row("companions", CASE, name, PEER, middle, None, spread=spread))
    return rows + memory_rows("companions", CASE, steps, tuple(steps)[1:])
