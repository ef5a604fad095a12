"""One run of a method in this process: made by the task, trained as ever, measured on the way and at the end."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PrinterCallback, TrainerCallback, set_seed

from ..base import Gate
from ..dropout import set_dropout
from ..dropout.places import Map
from ..patching import unwrap
from ..report import calibration_error
from ..runs.errors import one_line, refused_as_run
from ..runs.settings import make_settings
from .cells import NOTHING
from .measures import Base, Bins, Diverged, evaluated, penalty_shares
from .plan import Plan
from .samples import Samples


__all__ = ["Runner", "apply_dropout"]

POINTS = 5  # of a curve, unless the recipe says how often; we chose it

Report = Callable[[int, float], bool]  # of a step and a held-out loss, whether to stop


def apply_dropout(model: nn.Module, dropout: float | Mapping[str, float] | None) -> None:
    """Set the dropout of a method.

    Args:
        dropout (`float` or mapping, *optional*):
            A rate for every dropout there is, in the head too, and for residual branches where there is none; or rates
            by kind.
    """
    if dropout is None:
        return
    inner = unwrap(model)
    if isinstance(dropout, Mapping):
        rates = {kind: rate for kind, rate in dropout.items() if kind != "head"}
        if rates:
            set_dropout(model, **rates)
        if "head" in dropout:
            _set_head(inner, dropout["head"])
        return
    map_ = Map(inner)
    kinds = {kind: dropout for kind in ("attention", "ffn") if map_.of(kind)}
    if map_.of("hidden") or (dropout and map_.missing("hidden")):
        kinds["hidden"] = dropout
    if kinds:
        set_dropout(model, **kinds)
    if not dropout:
        for module in inner.modules():
            if isinstance(module, _DropoutNd) and not isinstance(module, Gate):
                module.p = 0.0
    _set_head(inner, dropout)


def _set_head(model: Any, rate: float) -> None:
    """The dropout of the task's head: what is not in the model that it stands on."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = set(getattr(base, base.base_model_prefix, base).modules())
    for module in base.modules():
        if module not in body and isinstance(module, _DropoutNd) and not isinstance(module, Gate):
            module.p = rate


def _goes_on(step: int, loss: float) -> bool:
    return False


class _Curve(TrainerCallback):
    """Measures while a run trains."""

    def __init__(self, trainer: Any, every: int | None, measure: Callable[[], dict[str, float]], report: Report):
        self.trainer, self.every, self.measure, self.report = trainer, every, measure, report
        self.points: list[dict[str, float]] = []
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self.every or max(-(-state.max_steps // POINTS), 1)
        if state.global_step % every == 0 and state.global_step < state.max_steps:
            self.points.append({"step": state.global_step, **self.measure()})
            if self.report(state.global_step, self.points[-1]["eval_loss"]):
                self.stopped = control.should_training_stop = True


class Runner:
    """Runs cells and trials of a comparison, one after the other; none depends on what ran before.

    Args:
        plan ([`Plan`]): the comparison.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.samples = Samples.load(plan)

    @cached_property
    def base(self) -> Base:
        return Base.load(self.plan, self.samples.probes)

    @cached_property
    def objective(self) -> dict[str, Any]:
        """What the recipe itself says of the loss, see [`TaskFacts`]."""
        if not self.plan.facts.objective:
            return {}
        args = make_settings(self.plan.run_recipe(NOTHING, "unused", 0)).args
        return {name: getattr(args, name) for name in self.plan.facts.objective}

    def trainer(
        self, settings: Mapping[str, Any], size: int, seed: int, folder: str, held_out: Any, **fixed: Any
    ) -> Any:
        """The task's trainer for a method: the same sample, order and new head for all methods under a seed."""
        recipe = self.plan.run_recipe(settings, folder, seed, **fixed)
        made = make_settings(recipe)
        set_seed(seed)  # new heads and adapters are drawn before the trainer is made
        trainer = recipe.make_trainer(made, {"train": self.samples.sample(size, seed), "eval": held_out})
        with refused_as_run("dropout"):
            apply_dropout(trainer.model, settings["dropout"])
        trainer.remove_callback(PrinterCallback)
        return trainer

    def cell(self, settings: Mapping[str, Any], size: int, seed: int) -> dict[str, Any]:
        """The numbers of a cell, as `cells.jsonl` has them."""
        base = self.base  # loaded before anything is drawn
        with tempfile.TemporaryDirectory() as folder:
            kind = self.plan.facts.confidence
            bins = None if kind is None else Bins(kind)
            trainer, curve = self._trained(settings, size, seed, folder, self.samples.held_out, _goes_on, bins)
            lines = None if bins is None else bins.lines()
            last = curve[-1]
            measures: dict[str, float | None] = {key: value for key, value in last.items() if key != "step"}
            measures["gap"] = last["eval_loss"] - last["train_loss"]
            measures["ece"] = None if lines is None else calibration_error(lines)
            measures["drift"] = base.drift(trainer.model)
            found = {
                "measures": measures, "history": curve, "calibration": lines, "penalties": penalty_shares(trainer),
            }  # fmt: skip
        del trainer
        gc.collect()
        return found

    def loss(self, settings: Mapping[str, Any], size: int, seed: int, report: Report) -> float | None:
        """The loss on the validation split at the end of a trial; `None` if `report` stopped it."""
        with tempfile.TemporaryDirectory() as folder:
            _, curve = self._trained(settings, size, seed, folder, self.samples.validation, report)
        gc.collect()
        return curve[-1]["eval_loss"] if curve else None

    def _trained(
        self,
        settings: Mapping[str, Any],
        size: int,
        seed: int,
        folder: str,
        held_out: Any,
        report: Report,
        bins: Bins | None = None,
    ) -> tuple[Any, list[dict[str, float]]]:
        """A trainer after training, and its curve; the curve of a run that was stopped is empty. The
        held-out data at its end fill the bins."""
        objective = self.objective  # first: new arguments reset the state of accelerate, which the trainer needs
        trainer = self.trainer(settings, size, seed, folder, held_out)

        def measure(bins: Bins | None = None) -> dict[str, float]:
            return evaluated(trainer, self.plan.recipe.further_metrics, bins, objective)

        curve = _Curve(trainer, self.plan.compare.evaluate_every, measure, report)
        trainer.add_callback(curve)
        with refused_as_run("training stopped", (ValueError, RuntimeError, OSError)):
            try:
                trainer.train()
            except FloatingPointError as error:
                raise Diverged(one_line(error)) from error
        if curve.stopped:
            return trainer, []
        return trainer, [*curve.points, {"step": trainer.state.global_step, **measure(bins)}]
