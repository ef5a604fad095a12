"""Gradient dropout in a trainer: the second gradient, averaged as the first one is, and applied before clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..optimizers import GradientDropout
from ..penalties import Consistency
from .penalty_terms import PenaltyTerms


if TYPE_CHECKING:
    from ..trainer import RegularizerMixin

__all__ = ["GradientDropping"]


class GradientDropping:
    """Belongs to one trainer.

    Args:
        trainer ([`RegularizerMixin`]): whose gradients are dropped.
        dropout ([`GradientDropout`]): how.
        teacher (`nn.Module`, *optional*): the frozen model; by default the trained one with its adapter off.

    Raises:
        `ValueError`: where the loss has no graph that a second gradient could be taken of, or parameters are sharded.
    """

    def __init__(self, trainer: RegularizerMixin, dropout: GradientDropout, teacher: nn.Module | None) -> None:
        self.trainer, self.dropout = trainer, dropout
        kind = trainer.accelerator.distributed_type.value
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise ValueError(f"{dropout.NAME}: a second gradient is not possible under {kind}. Use DDP.")
        if not trainer._plain_loss:
            raise ValueError(
                f"{dropout.NAME}: {type(trainer).__name__} stands on a trainer that computes its loss itself, whose "
                "outputs are not those that the frozen model is compared with. Use RegularizedTrainer."
            )
        distillation = Consistency(temperature=dropout.temperature, name=dropout.NAME)
        self.terms = PenaltyTerms([distillation], trainer.bare_model, teacher)

    def collect(self, inputs: Mapping[str, Any], outputs: Any) -> None:
        """The gradient of the distillation on a micro-batch: its part of the mean over those of a step."""
        trainer = self.trainer
        [value] = self.terms(trainer.bare_model, inputs, outputs, trainer._progress).values()
        value = value / trainer.current_gradient_accumulation_steps
        scaler = trainer.accelerator.scaler
        if scaler is not None:  # fp16: as the loss is
            value = scaler.scale(value)
        self.dropout.collect(value, trainer.bare_model.parameters())

    def apply(self) -> None:
        """Once a step, when the gradients of all micro-batches and processes are there."""
        trainer = self.trainer
        several = trainer.accelerator.num_processes > 1
        reduce = trainer._over_processes if several else None
        seed = trainer.args.seed if self.dropout.seed is None else self.dropout.seed
        self.dropout.apply(trainer.bare_model.parameters(), trainer.state.global_step, reduce, seed=seed)
