"""early_stopping: arguments that agree, refusals that change nothing, and trainers that stop and go back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments
from hf_reg.stopping import early_stopping

from .distributed.heads import make, rows


def arguments(kind: type = TrainingArguments, folder: Any = "unused", **settings: Any) -> Any:
    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 500}
    return kind(str(folder), **(common | settings))


def values(args: TrainingArguments) -> dict[str, Any]:
    return {name: getattr(args, name) for name in type(args).__dataclass_fields__}


@pytest.mark.parametrize("kind", [TrainingArguments, RegularizedTrainingArguments])
@pytest.mark.parametrize("every", [None, 7])
def test_sets_what_the_constructor_would(kind: type, every: int | None) -> None:
    """The same fields as `TrainingArguments` itself, given all of them, ends up with."""
    when = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    if every is not None:
        when = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": every, "save_steps": every}  # type: ignore[dict-item]
    written = arguments(
        kind, load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=2, **when
    )
    args = arguments(kind)
    callback = early_stopping(args, patience=5, every=every, threshold=0.25)
    assert values(args) == values(written)
    assert type(args.eval_strategy) is type(written.eval_strategy)
    assert type(args.save_strategy) is type(written.save_strategy)
    assert isinstance(callback, EarlyStoppingCallback)
    assert (callback.early_stopping_patience, callback.early_stopping_threshold) == (5, 0.25)


@pytest.mark.parametrize(
    ("metric", "given", "better"),
    [
        ("eval_loss", None, False), ("loss", None, False), ("eval_perplexity", None, False),
        ("eval_accuracy", None, True), ("f1", None, True), ("eval_wer", False, False), ("eval_loss", True, True),
    ],
)  # fmt: skip
def test_direction(metric: str, given: bool | None, better: bool) -> None:
    args = arguments()
    early_stopping(args, metric=metric, greater_is_better=given)
    assert (args.metric_for_best_model, args.greater_is_better) == (metric, better)


def test_twice_and_what_agrees_is_accepted() -> None:
    args = arguments(eval_strategy="steps", eval_steps=5, metric_for_best_model="accuracy", save_total_limit=4)
    early_stopping(args, metric="eval_accuracy", every=5)
    early_stopping(args, metric="eval_accuracy", every=5)
    assert (args.save_steps, args.save_total_limit, args.greater_is_better) == (5, 4, True)
    args = arguments(
        eval_strategy="steps", metric_for_best_model="eval_perplexity"
    )  # the rest is derived by post_init
    assert (args.eval_steps, args.greater_is_better) == (500, True)
    early_stopping(args, metric="eval_perplexity", every=5)
    assert (args.eval_steps, args.greater_is_better) == (5, False)
    args = arguments(save_strategy="best", eval_strategy="epoch", load_best_model_at_end=True)
    early_stopping(args, metric="loss")
    assert args.save_strategy == "best"


@pytest.mark.parametrize(
    ("settings", "call", "found"),
    [
        ({"eval_strategy": "steps", "eval_steps": 10}, {}, "eval_strategy='steps' .*, eval_steps=10"),
        ({"eval_strategy": "epoch"}, {"every": 10}, r"eval_strategy='epoch' \(needed: 'steps'\)"),
        ({"save_strategy": "no"}, {}, r"save_strategy='no' \(needed: 'epoch'\)"),
        ({"save_strategy": "epoch"}, {"every": 10}, r"save_strategy='epoch' \(needed: 'steps'\)"),
        ({"save_steps": 20}, {}, r"save_steps=20 \(needed: 500\)"),
        ({"save_steps": 20}, {"every": 10}, r"save_steps=20 \(needed: 10\)"),
        ({"eval_strategy": "steps", "eval_steps": 20}, {"every": 10}, r"eval_steps=20 \(needed: 10\)"),
        ({"metric_for_best_model": "f1"}, {}, r"metric_for_best_model='f1' \(needed: 'eval_loss'\)"),
        (
            {"metric_for_best_model": "f1", "greater_is_better": False}, {"metric": "f1"},
            r"greater_is_better=False \(needed: True\)",
        ),
        ({"max_steps": 5}, {"every": 10}, r"max_steps=5 \(needed: at least every=10\)"),
        ({}, {"patience": 0}, "patience=0 is out of range"),
        ({}, {"every": 0}, "every=0 is out of range"),
        ({}, {"threshold": -1}, "threshold=-1 is out of range"),
        ({}, {"metric": "eval_"}, "names nothing"),
        ({}, {"every": 0.1}, "every must be a whole number, got 0.1"),
        ({}, {"patience": True}, "patience must be a number"),
    ],
)  # fmt: skip
def test_refused(settings: dict[str, Any], call: dict[str, Any], found: str) -> None:
    args = arguments(**settings)
    before = values(args)
    with pytest.raises((ValueError, TypeError), match=found):
        early_stopping(args, **call)
    assert values(args) == before


def test_no_arguments() -> None:
    with pytest.raises(TypeError, match="expects TrainingArguments, got dict"):
        early_stopping({})  # type: ignore[arg-type]


def scripted(base: type, scores: list[float]) -> type:
    """A trainer whose evaluations give `scores` in turn, and which keeps the weights of each."""

    class Scripted(base):  # type: ignore[misc]
        weights: list[torch.Tensor]

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            self.weights = [*getattr(self, "weights", []), self.model.classifier.weight.detach().clone()]
            metrics = {"eval_loss": scores[len(self.weights) - 1]}
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return Scripted


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize(
    ("base", "kind"), [(Trainer, TrainingArguments), (RegularizedTrainer, RegularizedTrainingArguments)]
)
def test_stops_and_reloads_the_best(base: type, kind: type, every: int | None, tmp_path: Path) -> None:
    """Eight rows in batches of four: two steps an epoch. The second evaluation is the best, the fourth the last."""
    args = arguments(
        kind, tmp_path, num_train_epochs=9, per_device_train_batch_size=4, learning_rate=1e-2,
    )  # fmt: skip
    callback = early_stopping(args, patience=2, every=every)
    trainer = scripted(base, [1.0, 0.5, 0.7, 0.6, 0.1, 0.1, 0.1, 0.1, 0.1])(
        model=make("classes/bert"), args=args, train_dataset=rows("classes/bert"), eval_dataset=rows("classes/bert"),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert len(trainer.weights) == 4 and trainer.state.global_step == 8
    assert trainer.state.best_metric == 0.5 and trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    final = trainer.model.classifier.weight
    assert torch.equal(final, trainer.weights[1]) and not torch.equal(final, trainer.weights[3])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]


@pytest.mark.parametrize(
    ("base", "kind"), [(Trainer, TrainingArguments), (RegularizedTrainer, RegularizedTrainingArguments)]
)
def test_real_evaluations(base: type, kind: type, tmp_path: Path) -> None:
    """A learning rate that ruins the model: the real evaluation loss rises, training stops, the best comes back."""
    args = arguments(kind, tmp_path, num_train_epochs=20, per_device_train_batch_size=4, learning_rate=0.5)
    trainer = base(
        model=make("classes/bert"), args=args, train_dataset=rows("classes/bert"), eval_dataset=rows("classes/bert"),
        callbacks=[early_stopping(args, patience=1)],
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert 2 <= len(losses) < 20 and losses[-1] >= min(losses[:-1])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))
