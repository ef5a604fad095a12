"""What a `Trainer` does differently with preferences, below whatever regularizes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ..distributed import data_parallel
from ..losses import RPOLossOutput, rpo_loss
from ..training.task_loss import TaskLoss
from ..training.terms import Terms
from .budget import TokenBudgetSampler, pair_sizes
from .data import REFERENCE, TOKENS
from .reference import Reference
from .scoring import AnswerScores, Limits


__all__ = ["PreferenceTrainer", "limits_of"]


def limits_of(trainer: Any) -> Limits:
    """What the way in which a run computes rules out."""
    kind = trainer.accelerator.distributed_type.value
    config = getattr(trainer.accelerator, "parallelism_config", None)
    compiled = any(hasattr(one, "_orig_mod") or one._compiled_call_impl is not None for one in trainer.model.modules())
    for stands, reason in (
        (trainer.args.torch_compile or compiled, "the model is compiled"),
        (trainer.args.n_gpu > 1, "torch.nn.DataParallel copies the model"),
        (getattr(config, "non_data_parallel_size", 1) > 1, "tensor or context parallelism splits a batch"),
    ):
        if stands:
            return Limits(chunks=reason, positions=reason, sharing=reason)
    sharded = f"{kind} may shard the head" if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") else None
    alone = None if trainer.args.share_prompts else "share_prompts=False"
    if trainer.args.neftune_noise_alpha is not None:
        alone = "neftune_noise_alpha scales its noise by the length of a row"
    return Limits(chunks=sharded, sharing=alone)


class PreferenceTrainer(Trainer):
    """A `Trainer` for batches of [`PreferenceCollator`], with [`rpo_loss`]. [`RPOTrainer`] is the one to use.

    Evaluation is a mean over pairs, each counted once on however many processes; with `variant="trl"`, whose loss
    belongs to no single pair, `eval_loss` is a mean over batches.

    Args:
        reference ([`Reference`]): what the policy is compared with.
        args, kwargs: of [`~transformers.Trainer`].
    """

    args: Any  # RPOConfig
    _signature_columns: list[str]

    def __init__(self, *args: Any, reference: Reference, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which `training_step` divides
        self.reference = reference
        policy = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._scores = AnswerScores(policy, limits_of(self))
        if reference.other is None:
            reference.scores = self._scores
        self._pairs = TaskLoss(self.accelerator, "examples")
        self._measured = {True: Terms(), False: Terms()}  # in training, in evaluation

    def _set_signature_columns_if_needed(self) -> None:
        if not self._signature_columns:
            self._signature_columns = [*TOKENS, *REFERENCE]

    def get_train_dataloader(self) -> DataLoader:
        """Batches of `max_tokens_per_batch`, if that is set."""
        args, pairs = self.args, self.train_dataset
        if args.max_tokens_per_batch is None or pairs is None:
            return super().get_train_dataloader()
        sharded = self._scores.limits.chunks is not None  # processes must agree before the model runs
        if not sharded:
            self._scores.prepare(self._prepare_inputs(self.data_collator([pairs[0]])))
        shared = not sharded and self._scores.sharing.works
        sizes = pair_sizes(pairs, args.max_length, args.truncation_mode, shared)
        seed = args.seed if args.data_seed is None else args.data_seed
        processes = data_parallel(self.accelerator)[1]
        loader = DataLoader(
            pairs, batch_sampler=TokenBudgetSampler(sizes, args.max_tokens_per_batch, seed, processes),
            collate_fn=self.data_collator, num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory, persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )  # fmt: skip
        return self.accelerator.prepare(loader)

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
        four = (chosen, rejected, ref_chosen, ref_rejected)
        found = self._loss(*four, lengths=inputs["chosen_lengths"])
        terms = {
            "loss_dpo": found.dpo, "loss_sft": found.sft, "rewards/chosen": found.rewards_chosen,
            "rewards/rejected": found.rewards_rejected, "rewards/margins": found.margins,
            "rewards/accuracies": found.accuracies, "logps/chosen": chosen, "logps/rejected": rejected,
        }  # fmt: skip
        if not training and self.args.variant != "trl":
            terms |= self._loss_by_pair(*four, lengths=inputs["chosen_lengths"])
        self._measure({name: values.detach().float() for name, values in terms.items()}, len(chosen), training)
        loss = found.loss
        if training:
            loss = self._pairs.weigh(loss, inputs, self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def _loss(self, *log_probs: torch.Tensor, lengths: torch.Tensor) -> RPOLossOutput:
        args = self.args
        return rpo_loss(
            *log_probs, beta=args.beta, eta=args.eta, variant=args.variant, lengths=lengths,
            label_smoothing=args.label_smoothing, base=args.base,
        )  # fmt: skip

    def _loss_by_pair(self, *log_probs: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both parts of the loss for each pair, so that those that only fill up a batch can be left out."""
        rows = zip(*(part.split(1) for part in (*log_probs, lengths)), strict=True)
        found = [self._loss(*row[:-1], lengths=row[-1]) for row in rows]
        return {
            "loss_dpo": torch.stack([one.dpo for one in found]), "loss_sft": torch.stack([one.sft for one in found])
        }  # fmt: skip

    def _measure(self, terms: dict[str, torch.Tensor], pairs: int, training: bool) -> None:
        if not training:  # without the pairs that fill up the last batch of several processes
            table = torch.stack([values.expand(pairs) for values in terms.values()], dim=1)
            table = self.accelerator.gather_for_metrics(table)
            pairs, terms = len(table), dict(zip(terms, table.unbind(1), strict=True))
        for name, values in terms.items():
            self._measured[training].add(name, values.mean(), pairs)

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
        means = self._means(False)
        if means:  # `Trainer` weighs the batches of several processes otherwise
            output.metrics[f"{prefix}_loss"] = means["loss_dpo"] + means["loss_sft"]
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self._means(True)
        super().log(logs, *args, **kwargs)
