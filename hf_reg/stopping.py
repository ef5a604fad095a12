"""`early_stopping`: the five training arguments that early stopping hangs on, set together or not at all."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .base import check_range


__all__ = ["early_stopping"]

LOWER_IS_BETTER = ("loss", "perplexity")


def early_stopping(
    args: TrainingArguments,
    *,
    patience: int = 3,
    metric: str = "eval_loss",
    greater_is_better: bool | None = None,
    every: int | None = None,
    threshold: float = 0.0,
) -> EarlyStoppingCallback:
    """Set up `args` for early stopping and return the callback: evaluation and saving at the same moments, the best
    model loaded at the end.

    Sets `eval_strategy` and `save_strategy` (with `eval_steps` and `save_steps`), `load_best_model_at_end`,
    `metric_for_best_model`, `greater_is_better`, and `save_total_limit=2` where it is None (the best and the last
    checkpoint; our choice). `save_strategy="best"` is kept: it fits. Call it before the trainer is made.

    Args:
        args ([`~transformers.TrainingArguments`]): changed in place, or left as they are when an error is raised.
        patience (`int`, *optional*, defaults to 3): evaluations in a row without improvement before training stops.
        metric (`str`, *optional*, defaults to `"eval_loss"`): what to watch, with or without `eval_`.
        greater_is_better (`bool`, *optional*):
            Which way is better. By default False for names that end in `loss` or `perplexity` and True for others.
        every (`int`, *optional*): optimizer steps between two evaluations; None evaluates after every epoch.
        threshold (`float`, *optional*, defaults to 0.0): by how much the metric must improve to count.

    Returns:
        [`~transformers.EarlyStoppingCallback`]: for the trainer's `callbacks`.

    Raises:
        `ValueError`: if `args` say something else already, or a setting is out of range.
        `TypeError`: if a setting is of the wrong type.

    Example:

    ```python
    trainer = RegularizedTrainer(model, args, callbacks=[early_stopping(args, metric="accuracy", every=100)], ...)
    ```
    """
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"early_stopping expects TrainingArguments, got {type(args).__name__}.")
    if not isinstance(metric, str) or metric.removeprefix("eval_") == "":
        raise ValueError(f"early_stopping: metric={metric!r} names nothing; give a name such as 'eval_loss'.")
    for name, value in {"patience": patience, **({} if every is None else {"every": every})}.items():
        if not isinstance(value, int):
            raise TypeError(f"early_stopping: {name} must be a whole number, got {value!r} ({type(value).__name__}).")
        check_range("early_stopping", name, value, 1, float("inf"))
    check_range("early_stopping", "threshold", threshold, 0, float("inf"))
    if greater_is_better is None:
        greater_is_better = not metric.endswith(LOWER_IS_BETTER)

    wanted: dict[str, Any] = {
        "eval_strategy": IntervalStrategy.EPOCH if every is None else IntervalStrategy.STEPS,
        "save_strategy": SaveStrategy.EPOCH if every is None else SaveStrategy.STEPS,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": greater_is_better,
        "do_eval": True,  # as TrainingArguments does when eval_strategy is given to it
    }
    if every is not None:
        wanted |= {"eval_steps": every, "save_steps": every}
    if args.save_strategy == SaveStrategy.BEST:
        del wanted["save_strategy"]
        wanted.pop("save_steps", None)
    if args.save_total_limit is None:
        wanted["save_total_limit"] = 2
    _refuse_contradictions(args, wanted, every)
    for name, value in wanted.items():
        setattr(args, name, value)
    return EarlyStoppingCallback(patience, threshold)


def _refuse_contradictions(args: TrainingArguments, wanted: dict[str, Any], every: int | None) -> None:
    """Raise `ValueError` for fields that hold neither their default, nor what is wanted, nor what transformers derives
    from other fields."""
    defaults = {name: field.default for name, field in type(args).__dataclass_fields__.items()}
    derived: dict[str, Any] = {}  # what __post_init__ fills in
    if args.eval_strategy == IntervalStrategy.STEPS:
        derived["eval_steps"] = args.logging_steps
    if args.metric_for_best_model is not None:
        derived["greater_is_better"] = not args.metric_for_best_model.endswith("loss")
    asked = dict(wanted)
    if every is None:
        asked["eval_steps"] = None
        if "save_strategy" in wanted:  # its default is also what a user may write, so the number tells
            asked["save_steps"] = defaults["save_steps"]
    found = []
    for name, value in asked.items():
        now = getattr(args, name)
        same = now == value
        if name == "metric_for_best_model" and now is not None:
            same = now.removeprefix("eval_") == value.removeprefix("eval_")
        unset = now == defaults[name] or (name in derived and now == derived[name])
        if name not in ("do_eval", "load_best_model_at_end") and not same and not unset:
            found.append(f"{name}={getattr(now, 'value', now)!r} (needed: {getattr(value, 'value', value)!r})")
    if every is not None and 0 < args.max_steps < every:
        found.append(f"max_steps={args.max_steps} (needed: at least every={every})")
    if found:
        when = "after every epoch (every=None)" if every is None else f"every {every} steps"
        raise ValueError(
            f"early_stopping evaluates and saves {when} and watches {wanted['metric_for_best_model']!r}, but the "
            f"training arguments say {', '.join(found)}. Leave these fields out, or call early_stopping with settings "
            "that agree with them; nothing was changed."
        )
