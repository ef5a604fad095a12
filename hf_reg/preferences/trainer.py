"""What a `Trainer` does differently with preferences, below whatever regularizes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..losses import rpo_loss
from ..training.task_loss import TaskLoss
from ..training.terms import Terms
from .data import REFERENCE, TOKENS
from .reference import Reference
from .scoring import AnswerScores


__all__ = ["PreferenceTrainer", "whole_logits_reason"]


def whole_logits_reason(trainer: Any) -> str | None:
    """Why the head cannot be applied outside of the model in this run; `None`: it can."""
    kind = trainer.accelerator.distributed_type.value
    config = getattr(trainer.accelerator, "parallelism_config", None)
    compiled = any(hasattr(one, "_orig_mod") or one._compiled_call_impl is not None for one in trainer.model.modules())
    for stands, reason in (
        (trainer.args.torch_compile or compiled, "the model is compiled"),
        (trainer.args.n_gpu > 1, "torch.nn.DataParallel copies the model"),
        (kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"), f"{kind} may shard the head"),
        (getattr(config, "non_data_parallel_size", 1) > 1, "tensor or context parallelism splits a batch"),
    ):
        if stands:
            return reason
    return None


class PreferenceTrainer(Trainer):
    """A `Trainer` for batches of [`PreferenceCollator`], with [`rpo_loss`]. [`RPOTrainer`] is the one to use.

    Args:
        reference ([`Reference`]): what the policy is compared with.
        args, kwargs: of [`~transformers.Trainer`].
    """

    def __init__(self, *args: Any, reference: Reference, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which `training_step` divides
        self.reference = reference
        self._scores = AnswerScores(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        self._scores.reason = whole_logits_reason(self)
        if reference.other is None:
            reference.scores = self._scores
        self._pairs = TaskLoss(self.accelerator, "examples")
        self._measured = {True: Terms(), False: Terms()}  # in training, in evaluation

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*TOKENS, *REFERENCE]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._pairs.open(batches)
        return batches, items

    def _prepare_inputs(self, inputs: Any) -> Any:
        """With labels, from which penalties read where the answers are."""
        batch = super()._prepare_inputs(inputs)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean over the pairs of a step, as a micro-batch's part; outputs, if asked for, with whole logits."""
        training = model.training
        reference = self.reference({key: inputs[key] for key in inputs if not key.startswith("output_")})
        sums, outputs = self._scores(inputs, model, whole=return_outputs)
        (chosen, rejected), (ref_chosen, ref_rejected) = sums.chunk(2), reference.to(sums.dtype).chunk(2)
        args: Any = self.args
        found = rpo_loss(
            chosen, rejected, ref_chosen, ref_rejected, beta=args.beta, eta=args.eta, variant=args.variant,
            lengths=inputs["chosen_lengths"], label_smoothing=args.label_smoothing, base=args.base,
        )  # fmt: skip
        terms = {
            "loss_dpo": found.dpo, "loss_sft": found.sft, "rewards/chosen": found.rewards_chosen,
            "rewards/rejected": found.rewards_rejected, "rewards/margins": found.margins,
            "rewards/accuracies": found.accuracies, "logps/chosen": chosen, "logps/rejected": rejected,
        }  # fmt: skip
        for name, values in terms.items():
            self._measured[training].add(name, values.detach().float().mean(), len(chosen))
        loss = found.loss
        if training:
            loss = self._pairs.weigh(loss, inputs, self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss alone: what is measured beside it is in the metrics."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, batch).detach(), None, None

    def _means(self, training: bool) -> dict[str, float]:
        return self._measured[training].mean(lambda values: self.accelerator.reduce(values, "mean"))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._measured[False].clear()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._means(False).items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self._means(True)
        super().log(logs, *args, **kwargs)
