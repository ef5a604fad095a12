"""What a regularized run does around its steps: a random stream for each rank, AdaLoRA's budget, penalties' state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ..checkpoints.block import note_training
from ..distributed import data_parallel, seed_rank
from ..optimizers import Companion
from .activity import MODE, Activity
from .adapter_losses import adapters_in_training, after_optimizer
from .terms import Terms


if TYPE_CHECKING:
    from ..trainer import RegularizerMixin

__all__ = ["RegularizationCallback"]

STATE = "hf_reg_penalties.safetensors"


class RegularizationCallback(TrainerCallback):
    """Belongs to one trainer, which adds it by itself."""

    def __init__(self, trainer: RegularizerMixin) -> None:
        self.trainer = trainer
        self.measured = Terms()  # what adapters measured after the steps since the last log
        self.activity: Activity | None = None
        self._skipped = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._logged_step = state.global_step
        for name, config in adapters_in_training(self.trainer.bare_model):
            if getattr(config, "orthonormality", "off") == "decoupled" and self.trainer.is_deepspeed_enabled:
                raise ValueError(
                    f"Adapter {name!r} takes a step of its own after the optimizer's (orthonormality='decoupled'), "
                    "which DeepSpeed's copies of the weights would undo. Set orthonormality='coupled', or use FSDP2."
                )
        trainer = self.trainer
        note_training(trainer.bare_model, trainer._own_penalties, args.seed, trainer.companions)  # of a new trial, too
        self.activity = Activity(trainer.bare_model, bool(args.torch_compile))
        seed_rank(args.seed, data_parallel(self.trainer.accelerator)[0])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.activity is not None:
            self.activity.note()

    def read(self, mean_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """What was measured, and what acted, since the last log."""
        if self.activity is not None:
            self.measured.merge(self.activity.read(self.trainer.args.device))
        found = self.measured.mean(mean_over_processes)
        return {name: value for name, value in found.items() if name != MODE or value < 1}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tuner: Any = getattr(self.trainer.bare_model, "base_model", None)
        if hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(state.global_step)
        skipped, self._skipped = self.trainer.skipped_steps > self._skipped, self.trainer.skipped_steps
        if skipped or self.trainer.accelerator.optimizer_step_was_skipped:
            return
        share = kwargs["optimizer"].param_groups[0]["lr"] / args.learning_rate if args.learning_rate else 0.0
        for name, value in after_optimizer(self.trainer.bare_model, share).items():
            self.measured.add(name, value)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._penalties.flush()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._penalties.flush()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        tensors = {
            f"{name}/{key}": tensor.contiguous()
            for name, one in self._stateful.items()
            for key, tensor in one.state_dict().items()
        }
        if tensors and args.should_save and folder.is_dir():
            save_file(tensors, folder / STATE)

    def load(self, checkpoint: str) -> None:
        """Give every penalty and companion the state that it had when `checkpoint` was written."""
        path = Path(checkpoint) / STATE
        saved = load_file(path) if path.is_file() else {}
        for name, one in self._stateful.items():
            state = {k.removeprefix(f"{name}/"): v for k, v in saved.items() if k.startswith(f"{name}/")}
            if state:
                one.load_state_dict(state)

    @property
    def _stateful(self) -> dict[str, Any]:
        found: dict[str, Any] = {one.name: one for one in self.trainer.penalties if hasattr(one, "state_dict")}
        callbacks = self.trainer.callback_handler.callbacks
        return found | {one.NAME: one for one in callbacks if isinstance(one, Companion)}
