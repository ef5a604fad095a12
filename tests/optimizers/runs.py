"""Short runs of tiny models with companions, and what one step of them must be.

Run by torchrun (`-m tests.optimizers.runs FOLDER [--sharded]`) or imported for one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments

from ..distributed.heads import BERT, HEADS, ROWS, make, rows


RATE = 0.05


class Taken(TrainerCallback):
    """Weights and gradients as they are after each step, before gradients are cleared."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = {name: whole(p).clone() for name, p in model.named_parameters()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: (self.before[name], whole(p.grad).clone()) for name, p in model.named_parameters()})


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def run(
    folder: Any,
    cls: type = RegularizedTrainer,
    *,
    head: str = "classes/bert",
    data: Any = None,
    callbacks: Any = (),
    optimizer: Any = torch.optim.SGD,
    companions: Any = None,
    compute_loss_func: Any = None,
    model: Any = None,
    resume: Any = None,
    **settings: Any,
) -> Any:
    """A trained trainer, rows in order."""
    common: dict[str, Any] = {
        "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": RATE, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant",
    }  # fmt: skip
    kind = RegularizedTrainingArguments if issubclass(cls, RegularizedTrainer) else TrainingArguments
    callbacks = list(callbacks)
    more: dict[str, Any] = {}
    if companions is not None and cls is RegularizedTrainer:
        more["companions"] = companions() if callable(companions) else companions
    elif companions is not None:
        callbacks.append(companions() if callable(companions) else companions)
    for key in ("penalties", "teacher"):
        if key in settings:
            more[key] = settings.pop(key)
    made = cls(
        model=make(head) if model is None else model, args=kind(str(folder), **(common | settings)),
        train_dataset=rows(head) if data is None else data, callbacks=callbacks, compute_loss_func=compute_loss_func,
        optimizer_cls_and_kwargs=(optimizer, {"lr": RATE}), **more,
    )  # fmt: skip
    made.train(resume_from_checkpoint=resume)
    return made


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: whole(p).clone() for name, p in made.model.named_parameters()}


def cut(accumulation: int) -> dict[str, int]:
    """The settings that cut the batch of all rows into so many micro-batches a process."""
    size = ROWS // accumulation // int(os.environ.get("WORLD_SIZE", 1))
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}


def gradients(accumulation: int, companions: Any, cls: type = RegularizedTrainer, **settings: Any) -> Any:
    """The gradients that the optimizer used in each step."""
    seen = Taken()
    run("unused", cls, companions=companions, callbacks=[seen], **cut(accumulation), **settings)
    return [{name: gradient for name, (_, gradient) in step.items()} for step in seen.steps]


def backward(head: str = "classes/bert", model: Any = None) -> nn.Module:
    """A model with the gradients of the whole batch."""
    model, part = model or make(head), rows(head)
    model(**{key: torch.stack([row[key] for row in part]) for key in part[0]}).loss.backward()
    return model


def two_halves(folder: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a run of 10 steps, and of one of 5 that is resumed; shuffled rows, dropout, AdamW."""
    HEADS["dropout/bert"] = ("BertForSequenceClassification", "bert", BERT | {"hidden_dropout_prob": 0.1})
    data = [row | {"labels": torch.tensor(i % 3)} for i, row in enumerate(rows("classes/bert", 24))]
    common = dict(head="dropout/bert", data=data, optimizer=torch.optim.AdamW, max_steps=10, save_strategy="steps",
                  save_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                  train_sampling_strategy="random", lr_scheduler_type="linear", max_grad_norm=1.0)  # fmt: skip
    whole_run = run(folder / "whole", **(common | settings))

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    first = run(folder / "halves", callbacks=[Stop()], **(common | settings))
    assert first.state.global_step == 5
    second = run(folder / "halves", resume=str(folder / "halves" / "checkpoint-5"), **(common | settings))
    assert second.state.global_step == 10
    return tuple(
        load_file(Path(made.args.output_dir) / "checkpoint-10" / "model.safetensors") for made in (whole_run, second)
    )  # type: ignore[return-value]


def other() -> nn.Module:
    """A teacher that is not the model."""
    model = make("classes/bert")
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(index)), alpha=0.3)
    return model


COMPANIONS: dict[str, Any] = {
    "none": None,
    "gradient_dropout": {"gradient_dropout": {"rate": 0.7, "seed": 3}},
    "perp_grad": {"perp_grad": {}},
    "decoupled_l2_sp": {"decoupled_l2_sp": {"alpha": 2.0, "beta": 3.0}},
}


if __name__ == "__main__":
    target, results = Path(sys.argv[1]), {}
    chosen: dict[str, Any] = {}
    if "--sharded" in sys.argv:
        from ..distributed.fsdp_on_cpu import FSDP2

        chosen = dict(FSDP2)
    for parts in (1, 4):
        for what, spec in COMPANIONS.items():
            if what == "gradient_dropout" and chosen:
                continue
            more = {"teacher": other()} if what == "gradient_dropout" else {}
            done = run(target / "out", companions=spec, max_steps=3, **cut(parts), **chosen, **more)
            results[what, parts] = weights(done)
    torch.save(results, target / f"weights-{os.environ['RANK']}.pt")
