"""`RegularizedTrainer`: a `Trainer` whose every extra loss term is right under accumulation, processes and resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .base import Penalty
from .cards.of_trainer import create_model_card
from .checkpoints.block import note_training
from .distributed import check_launch, ddp_explained, wrap_anew
from .optimizers import Companion, GradientDropout
from .patching import patch_model
from .recipes import make_companions, make_patches, make_penalties
from .schedules import ScheduleCallback
from .training.adapter_losses import adapter_losses, muted
from .training.arguments import RegularizedTrainingArguments
from .training.callback import RegularizationCallback
from .training.combinations import refuse_combinations
from .training.example_ids import EXAMPLE_IDS, with_example_ids
from .training.finite import FiniteTerms, not_finite
from .training.fused_step import FusedStep
from .training.gradient_dropping import GradientDropping
from .training.loss_scale import penalty_factor
from .training.penalty_terms import PenaltyTerms
from .training.second_forward import SecondForward
from .training.task_loss import TaskLoss
from .training.teacher_cache import make_teacher_cache
from .training.terms import Terms, gradient_shares
from .training.weights import WeightsMixin


__all__ = ["RegularizedTrainer", "RegularizerMixin"]


class RegularizerMixin(WeightsMixin):
    """Penalties and patches for any `Trainer`: put it before the trainer in a class of your own.

    ```python
    class RegularizedSFTTrainer(RegularizerMixin, SFTTrainer): ...
    ```

    Args:
        penalties (`str`, `dict`, `list` or [`Penalty`], *optional*): terms that join the loss, see [`make_penalties`].
        patches (`str`, `dict`, `list` or [`Patch`], *optional*): what [`patch_model`] attaches before training.
        companions (`str`, `dict`, `list` or [`Companion`], *optional*): what acts beside the optimizer.
        teacher (`nn.Module`, *optional*): what penalties compare with; by default the model with its adapter off.

    The loss of a micro-batch is the task's plus `weight * schedule * penalty` for each penalty, scaled so that the
    gradient of a step is that of its whole batch at once, however it is cut into micro-batches and processes
    (`hf_reg/training/loss_scale.py`). Logs show every term as `loss_<name>`; they sum to `loss`. `eval_loss` is the
    task alone. Logs show, too, which patches and dropouts acted ([`~hf_reg.training.activity.Activity`]). A resumed
    run goes on exactly, unless the data collator draws from torch's global random stream: `Trainer` collates the first
    batches before it restores that, so seed such a collator from its examples.

    Raises:
        `ValueError`: for what cannot be combined. `RuntimeError`: for a launch that is not what was asked for.
        `FloatingPointError`: in training, for a term that is not finite.
    """

    train_dataset: Any
    model_accepts_loss_kwargs: bool
    _signature_columns: list[str]
    create_model_card = create_model_card

    def __init__(
        self, *args: Any, penalties: Any = None, patches: Any = None, companions: Any = None,
        teacher: nn.Module | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        given = kwargs.get("args") or next((a for a in args if hasattr(a, "gradient_accumulation_steps")), None)
        self._patches = make_patches(patches if patches is not None else getattr(given, "patches", None))
        chosen = make_penalties(penalties if penalties is not None else getattr(given, "penalties", None))
        beside = make_companions(companions if companions is not None else getattr(given, "companions", None))
        around = [one for one in beside if not isinstance(one, GradientDropout)]
        kwargs |= {"callbacks": [*(kwargs.get("callbacks") or ()), *around]} if around else {}
        if given is not None:
            model = kwargs.get("model", args[0] if args else None)
            brought = adapter_losses(model, given.learning_rate, chosen)
            own = kwargs.get("optimizers"), kwargs.get("compute_loss_func")
            refuse_combinations(given, self._patches, chosen, brought, *own, model)
        self._step_terms, self._terms, self._eval_terms, self._shares = Terms(), Terms(), Terms(), Terms()
        self._finite, self._second_forward = FiniteTerms(), SecondForward()
        self._logged_step, self.skipped_steps = 0, 0
        super().__init__(*args, **kwargs)
        check_launch(self.args, self.accelerator)
        bare, self._own_penalties = self.bare_model, list(chosen)
        chosen += adapter_losses(bare, self.args.learning_rate, chosen)
        self._penalties = PenaltyTerms(chosen, bare, teacher, make_teacher_cache(self.args, chosen, self.accelerator))
        self._attach_patches()
        if "example_ids" in self._penalties.needs and self.train_dataset is not None:
            self._penalties.dataset = self.train_dataset = with_example_ids(self.train_dataset)
        self._fused = FusedStep(self)
        self._task = TaskLoss(self.accelerator, getattr(self.args, "average_loss_over", "items"))
        self._plain_loss = super().compute_loss.__func__ is Trainer.compute_loss
        dropout = next((one for one in beside if isinstance(one, GradientDropout)), None)
        self._dropping = GradientDropping(self, dropout, teacher) if dropout is not None else None
        callbacks = self.callback_handler.callbacks
        self.companions = list(dict.fromkeys([*beside, *(one for one in callbacks if isinstance(one, Companion))]))
        note_training(bare, self._own_penalties, self.args.seed, self.companions)
        if not any(isinstance(one, ScheduleCallback) for one in callbacks):
            self.add_callback(ScheduleCallback())
        self._around = RegularizationCallback(self)
        self.add_callback(self._around)

    @property
    def penalties(self) -> list[Penalty]:
        """The penalties of this run, those that adapters bring included."""
        return self._penalties.penalties

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrappers of distributed training and compilation."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        if self._patches:
            patch_model(model, self._patches)
        if hasattr(self, "_penalties"):  # a further trial of a hyper-parameter search
            self._penalties.prepare(model)
            self._fused.forget()
            if self._dropping is not None:
                self._dropping.terms.prepare(model)
        return model

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if EXAMPLE_IDS not in self._signature_columns and "example_ids" in self._penalties.needs:
            self._signature_columns = [*self._signature_columns, EXAMPLE_IDS]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        wrap_anew(self.accelerator, self.model, self.model_wrapped)
        return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self._around.load(resume_from_checkpoint)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        batch = dict(inputs)  # the trainer below may take the labels out
        inputs = {key: value for key, value in inputs.items() if key != EXAMPLE_IDS}
        if model.training and not return_outputs and self._fused.applies(inputs, num_items_in_batch):
            return self._fused_loss(model, batch, num_items_in_batch)
        own_loss = self.label_smoother is not None or self.compute_loss_func is not None
        asks = self._plain_loss and not own_loss and self.model_accepts_loss_kwargs
        if asks and num_items_in_batch is not None:
            if not self._task.ask(self.bare_model, inputs, self.args.gradient_accumulation_steps):
                self.model_accepts_loss_kwargs = False
                num_items_in_batch = None
        extra = self._penalties.request(inputs)
        reads = self._penalties.read_outputs and not (model.training and self._second_forward.needed)
        wanted = return_outputs or reads or (model.training and self._dropping is not None)
        with muted(self.bare_model):
            result = super().compute_loss(
                model, {**inputs, **extra}, return_outputs=wanted, num_items_in_batch=num_items_in_batch
            )
        outputs: Any
        loss, outputs = result if wanted else (result, None)
        if model.training:
            seen = outputs
            if self._penalties.read_outputs:
                seen = self._second_forward(self.bare_model, batch | extra, outputs)
            loss = self._regularize(loss, self._is_scaled(num_items_in_batch), batch, seen)
        elif self.penalties:
            self._note_evaluation(batch, outputs)
        if extra and return_outputs:  # or they would be gathered as predictions
            added = {name.removeprefix("output_") for name in extra}
            outputs = type(outputs)(**{key: value for key, value in outputs.items() if key not in added})
        return (loss, outputs) if return_outputs else loss

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether `training_step` takes the task loss as scaled for accumulation: the rule of `Trainer`."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return accepts or self.compute_loss_func is not None

    def _regularize(self, loss: torch.Tensor, scaled: bool, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        if self._plain_loss and not scaled and self.label_smoother is None:
            loss = self._task.weigh(loss, inputs, self.current_gradient_accumulation_steps)
        added = self._weighted_penalties(scaled, inputs, outputs)
        if self._dropping is not None:
            self._dropping.collect(inputs, outputs)
        self._note_terms({"task": loss} | added, scaled)
        return sum(added.values(), loss)

    def _fused_loss(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        loss, terms = self._fused(model, inputs, num_items_in_batch)
        added = self._weighted_penalties(self._is_scaled(num_items_in_batch), inputs, None, batch=False)
        self._note_terms(terms | added, self._is_scaled(num_items_in_batch))
        return sum(added.values(), loss)

    def _weighted_penalties(
        self, scaled: bool, inputs: Mapping[str, Any], outputs: Any, batch: bool = True
    ) -> dict[str, torch.Tensor]:
        accumulation, last = self.current_gradient_accumulation_steps, self.accelerator.sync_gradients
        values = self._penalties(self.bare_model, inputs, outputs, self._progress, parameters=last, batch=batch)
        return {
            penalty.name: value * penalty_factor(scaled, accumulation, penalty.ON_PARAMETERS)
            for penalty, value in values.items()
        }

    def _note_terms(self, terms: Mapping[str, torch.Tensor], scaled: bool) -> None:
        self._finite.note(terms)
        for name, term in terms.items():
            self._step_terms.add(name, term, 1.0 if scaled else 1.0 / self.current_gradient_accumulation_steps)
        if self.accelerator.sync_gradients and len(terms) > 1 and getattr(self.args, "gradient_shares", False):
            for name, share in gradient_shares(terms, self.bare_model, self.accelerator).items():
                self._shares.add(name, share)

    @property
    def _progress(self) -> tuple[int, int, Sequence[float]]:
        losses = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        return self.state.global_step, max(self.state.max_steps, 1), losses

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if self._plain_loss and not (self._task.divides and self.model_accepts_loss_kwargs):
            self._task.open(batches)
        return batches, num_items_in_batch

    # steps that are not finite

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        with ddp_explained(not self._penalties.on_outputs_only):
            loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients and self._finite:
            self._check_finite(model)
            self._terms.merge(self._step_terms)
            if self._dropping is not None:
                self._dropping.apply()
        return loss

    def _check_finite(self, model: nn.Module) -> None:
        """Once an optimizer step: stop, or leave it out, if any term of any process is not finite."""
        if not (names := self._finite.take(self.accelerator)):
            return
        if getattr(self.args, "on_nonfinite", "raise") == "skip":
            self.skipped_steps += 1
            self._step_terms.clear()
            model.zero_grad(set_to_none=True)  # without gradients an optimizer moves nothing, decay included
            return
        raise not_finite(names, self.state.global_step + 1, self.args.output_dir)

    def _note_evaluation(self, inputs: Mapping[str, Any], outputs: Any) -> None:
        examples = len(next(value for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim()))
        first = not self._eval_terms  # parameters are the same for every batch
        values = self._penalties(self.bare_model, inputs, outputs, self._progress, parameters=first)
        for penalty, value in values.items():
            self._eval_terms.add(penalty.name, value, examples)

    def _over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "mean")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_terms = Terms()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        for name, value in self._eval_terms.mean(self._over_processes).items():
            output.metrics[f"{prefix}_loss_{name}"] = value
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            steps = max(self.state.global_step - self._logged_step, 1)
            terms = self._terms.total(self._over_processes)
            if self.penalties:
                logs |= {f"loss_{name}": value / steps for name, value in terms.items()}
            logs |= {f"share_{name}": value for name, value in self._shares.mean(self._over_processes).items()}
            logs |= self._around.read(self._over_processes)
            logs |= {"skipped_steps": float(self.skipped_steps)} if self.skipped_steps else {}
            self._logged_step = self.state.global_step
        super().log(logs, *args, **kwargs)


class RegularizedTrainer(RegularizerMixin, Trainer):
    """A [`~transformers.Trainer`] with [`RegularizerMixin`].

    Example:

    ```python
    trainer = RegularizedTrainer(
        model=model, args=RegularizedTrainingArguments("out"), train_dataset=train,
        patches="tlm", penalties={"l2_sp": 0.01, "mine": (0.1, lambda model, inputs, outputs: outputs.logits.var())},
    )
    ```
    """

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        super().__init__(model=model, args=args or RegularizedTrainingArguments(), **kwargs)
