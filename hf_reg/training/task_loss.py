"""The task's own loss, made exact: the mean over the items of a whole step, for every head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from ..distributed import data_parallel
from .loss_scale import count_items, divides_by_items, item_weight


__all__ = ["TaskLoss"]

logger = logging.get_logger("transformers.hf_reg")


class TaskLoss:
    """Finds out what a model's loss is a mean over, and weighs the micro-batches of a step accordingly.

    Args:
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
        average (`str`): `"items"` or `"examples"`, see [`RegularizedTrainingArguments`].
    """

    def __init__(self, accelerator: Accelerator, average: str) -> None:
        self.accelerator, self.average = accelerator, average
        self.total: torch.Tensor | None = None  # items of this step on all processes
        self.divides: bool | None = None  # whether the model divides by num_items_in_batch; None: not asked yet

    @property
    def processes(self) -> int:
        return data_parallel(self.accelerator)[1]

    def ask(self, model: nn.Module, inputs: Mapping[str, Any], accumulation: int) -> bool:
        """Whether the model divides its loss by `num_items_in_batch`; found out once, where it makes a difference."""
        parts = accumulation * self.processes
        if self.divides is None and parts > 1:
            self.divides = divides_by_items(model, inputs)
            if not self.divides:
                logger.warning(
                    f"{type(model).__name__} takes num_items_in_batch and ignores it, so the plain Trainer would "
                    f"multiply its gradients by {parts} (accumulation x processes). Here its loss is the mean over "
                    f"the {self.average} of the whole step."
                )
        return self.divides is not False

    def count(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        if self.average == "examples":
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        return count_items(inputs, self.accelerator.device)

    def open(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the items of a step: one reduction, and none for a step of one micro-batch on one process."""
        self.total = None
        if batches and len(batches) * self.processes > 1:
            counts = torch.stack([self.count(batch) for batch in batches]).sum()
            self.total = self.accelerator.reduce(counts, "sum")

    def weigh(self, loss: torch.Tensor, inputs: Mapping[str, Any], accumulation: int) -> torch.Tensor:
        """A micro-batch's mean loss, times its share of the step's items."""
        if self.total is None:
            return loss
        return loss * item_weight(self.count(inputs), self.total, accumulation, self.processes).to(loss.dtype)
