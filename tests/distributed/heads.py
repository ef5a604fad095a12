"""Tiny models with heads of every kind, eight rows each, and the gradient of one step as a trainer computes it.

Run by torchrun (`python -m torch.distributed.run -m tests.distributed.heads FOLDER`) or imported for one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments


ROWS, LENGTH, VOCABULARY = 8, 12, 64
WEIGHT = 0.3

BERT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": VOCABULARY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": VOCABULARY, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {  # what is predicted: class, configuration
    "classes/bert": ("BertForSequenceClassification", "bert", BERT),
    "classes/llama": ("LlamaForSequenceClassification", "llama", LLAMA),
    "tags/bert": ("BertForTokenClassification", "bert", BERT),
    "tokens/bert": ("BertForMaskedLM", "bert", BERT),
    "spans/bert": ("BertForQuestionAnswering", "bert", BERT | {"num_labels": 2}),
    "tokens/t5": ("T5ForConditionalGeneration", "t5", T5),
    "tokens/llama": ("LlamaForCausalLM", "llama", LLAMA),
    "lora/llama": ("LlamaForCausalLM", "llama", LLAMA),
}


def make(head: str) -> nn.Module:
    name, kind, settings = HEADS[head]
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **settings))
    if not head.startswith("lora"):
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def rows(head: str, count: int = ROWS) -> list[dict[str, torch.Tensor]]:
    """Rows whose numbers of labels differ widely, so that a mean of means is wrong."""
    generator = torch.Generator().manual_seed(1)
    what, found = head.split("/")[0], []
    for index in range(count):
        row = {"input_ids": torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)}
        draw = torch.randint(0, 3 if what == "tags" else VOCABULARY, (LENGTH,), generator=generator)
        if what == "classes":
            row["labels"] = torch.tensor(index % 3)
        elif what == "spans":
            row["start_positions"], row["end_positions"] = torch.tensor(index % 5), torch.tensor(5 + index % 7)
        else:
            draw[torch.arange(LENGTH) >= 2 + (index * 3) % LENGTH] = -100
            row["labels"] = draw
        found.append(row)
    return found


def weight_penalty(model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
    return sum(parameter.square().sum() for parameter in model.parameters())  # type: ignore[return-value]


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A `compute_loss_func`."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class Spy(TrainerCallback):
    """Keeps the gradients of every step as the optimizer finds them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append(
            {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in grads.items()}
        )


def gradients(
    head: str,
    per_device: int,
    accumulation: int,
    penalties: Any = None,
    trainer: type = RegularizedTrainer,
    count: int = ROWS,
    steps: int = 1,
    arguments: dict[str, Any] | None = None,
    takes_loss_arguments: bool = True,
    **kwargs: Any,
) -> list[dict[str, torch.Tensor]]:
    """The gradients of the first steps on `count` rows in order, with a learning rate of 0."""
    spy = Spy()
    kind = RegularizedTrainingArguments if trainer is RegularizedTrainer else transformers.TrainingArguments
    args = kind(
        "unused", max_steps=steps, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
        learning_rate=0.0, max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, train_sampling_strategy="sequential", **(arguments or {}),
    )  # fmt: skip
    if penalties is not None:
        kwargs["penalties"] = penalties
    model = make(head)
    if not takes_loss_arguments:
        model.accepts_loss_kwargs = False
    made = trainer(
        model=model, args=args, train_dataset=rows(head, count), callbacks=[spy],
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.0}), **kwargs,
    )  # fmt: skip
    made.train()
    assert made.args.world_size == int(os.environ.get("WORLD_SIZE", 1))
    return spy.steps


def expected(
    head: str, chosen: slice = slice(None), count: int = ROWS, weight: float = 0.0
) -> dict[str, torch.Tensor]:
    """The gradient of the whole batch at once."""
    model, part = make(head), rows(head, count)[chosen]
    loss = model(**{key: torch.stack([row[key] for row in part]) for key in part[0]}).loss
    (loss + weight * weight_penalty(model, None, None)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Norm of the difference relative to the norm of what is wanted."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    total: Callable[[Any], torch.Tensor] = torch.nn.utils.get_total_norm
    return float(total([found[name] - wanted[name] for name in wanted]) / total(list(wanted.values())))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = int(os.environ["WORLD_SIZE"])
    results = {}
    for name in HEADS:
        for accumulation in (1, 2, 4):
            for penalties in (None, {"weights": (WEIGHT, weight_penalty)}):
                per_device = ROWS // world // accumulation
                results[name, accumulation, penalties is not None, False] = gradients(
                    name, per_device, accumulation, penalties
                )[0]
    heavy = {"weights": (WEIGHT, weight_penalty)}
    for accumulation in (1, 4):
        size = ROWS // world // accumulation
        for path, (name, settings) in {
            "function": ("classes/bert", {"compute_loss_func": summed}),
            "smoothing": ("tokens/llama", {"arguments": {"label_smoothing_factor": 0.1}}),
            "no arguments": ("tags/bert", {"takes_loss_arguments": False}),
        }.items():
            results[path, accumulation, True, False] = gradients(name, size, accumulation, heavy, **settings)[0]
    for name in ("tags/bert", "tokens/llama"):  # 12 rows: the second window has one micro-batch a process
        results[f"short {name}", 2, True, False] = gradients(name, 2, 2, heavy, count=12, steps=2)[1]
    for name in ("lora/llama", "classes/bert"):
        found = gradients(
            name,
            ROWS // world // 2,
            2,
            {"weights": (WEIGHT, weight_penalty)},
            arguments={"gradient_checkpointing": True},
        )[0]
        results[name, 2, True, True] = found
    if int(os.environ["RANK"]) == 0:
        torch.save(results, folder / "gradients.pt")
