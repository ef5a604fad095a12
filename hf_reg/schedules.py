"""Schedules: how the strength of a regularizer moves over training, and what drives it.

A schedule is a pure function of the step (and, for `on_plateau`, of the validation losses so far), so there is
nothing to save and a resumed run continues exactly. It gives a *factor*; the rate in force is `rate * factor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from transformers import TrainerCallback


__all__ = [
    "SCHEDULES", "Schedule", "ScheduleCallback", "constant", "cosine", "curriculum", "exponential", "linear",
    "make_schedule", "model_step", "on_plateau", "two_phase", "v_shape",
]  # fmt: skip


class Schedule:
    """A factor over training. Subclasses are frozen dataclasses with `factor` and the highest value, `peak`."""

    peak: float = 1.0

    def factor(self, progress: float, losses: Sequence[float]) -> float:
        raise NotImplementedError(f"{type(self).__name__} must define `factor(progress, losses)`.")

    def __call__(self, step: int, total: int, losses: Sequence[float] = ()) -> float:
        """The factor at `step` of `total` steps (0 <= step <= total); `losses` are the validation losses so far."""
        if total <= 0:
            raise ValueError(
                f"A schedule needs the number of steps; got total={total}. Give `max_steps` or the step count."
            )
        return self.factor(min(max(step / total, 0.0), 1.0), losses)


def _not_negative(schedule: Schedule, **values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{type(schedule).__name__}: {name}={value!r} must be a finite number >= 0.")


def _fraction(schedule: Schedule, **values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise ValueError(
                f"{type(schedule).__name__}: {name}={value!r} must be a fraction of training between 0 and 1."
            )


@dataclass(frozen=True)
class _Between(Schedule):
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _not_negative(self, start=self.start, end=self.end)

    @property
    def peak(self) -> float:  # type: ignore[override]
        return max(self.start, self.end)


@dataclass(frozen=True)
class constant(Schedule):
    """The same factor throughout."""

    value: float = 1.0

    def __post_init__(self) -> None:
        _not_negative(self, value=self.value)

    @property
    def peak(self) -> float:  # type: ignore[override]
        return self.value

    def factor(self, progress: float, losses: Sequence[float]) -> float:
        return self.value


@dataclass(frozen=True)
class linear(_Between):
    """`start + (end - start) * t`: linear decay by default (Dynamic Dropout, arXiv 2411.03236)."""

    def factor(self, progress: float, losses: Sequence[float]) -> float:
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class cosine(_Between):
    """`end + (start - end) * (1 + cos(pi t)) / 2`; BA-LoRA's consistency weight uses `cosine(1.0, 0.1)`."""

    def factor(self, progress: float, losses: Sequence[float]) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class exponential(Schedule):
    """`start * exp(-k t)` (Dynamic Dropout, arXiv 2411.03236). `k = 5` is ours: it ends at 0.7 % of the start."""

    start: float = 1.0
    k: float = 5.0

    def __post_init__(self) -> None:
        _not_negative(self, start=self.start, k=self.k)

    @property
    def peak(self) -> float:  # type: ignore[override]
        return self.start

    def factor(self, progress: float, losses: Sequence[float]) -> float:
        return self.start * math.exp(-self.k * progress)


@dataclass(frozen=True)
class curriculum(Schedule):
    """`1 - exp(-gamma t)`: from 0 up, easy first (*Curriculum Dropout*, ICCV 2017, arXiv 1703.06229).

    The paper gives the probability to keep a unit, (1 - q) exp(-gamma t) + q with q = 1 - p at the end; that to drop
    it is p times this factor. `gamma = 10` for a whole run is the paper's 10 / T: it ends at 99.995 %.
    """

    gamma: float = 10.0

    def __post_init__(self) -> None:
        _not_negative(self, gamma=self.gamma)

    def factor(self, progress: float, losses: Sequence[float]) -> float:
        return 1 - math.exp(-self.gamma * progress)


@dataclass(frozen=True)
class v_shape(_Between):
    """Scheduled DropHead (arXiv 2004.13342): from `start` down to 0 in the warm-up, then up to `end`.

    `warmup` is the fraction of training spent going down, that of the learning rate's warm-up; 0.1 is our choice.
    """

    end: float = 1.0
    warmup: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction(self, warmup=self.warmup)

    def factor(self, progress: float, losses: Sequence[float]) -> float:
        if progress < self.warmup:
            return self.start * (1 - progress / self.warmup)
        return self.end * (progress - self.warmup) / (1 - self.warmup) if self.warmup < 1 else 0.0


@dataclass(frozen=True)
class two_phase(Schedule):
    """0 until `begin`, linear up to `value` over `ramp`, then constant. Defaults: BA-LoRA (arXiv 2408.04556 v6), 20 %
    + 5 %."""

    begin: float = 0.2
    ramp: float = 0.05
    value: float = 1.0

    def __post_init__(self) -> None:
        _fraction(self, begin=self.begin, ramp=self.ramp)
        _not_negative(self, value=self.value)

    @property
    def peak(self) -> float:  # type: ignore[override]
        return self.value

    def factor(self, progress: float, losses: Sequence[float]) -> float:
        if progress < self.begin:
            return 0.0
        if self.ramp == 0:
            return self.value
        return self.value * min((progress - self.begin) / self.ramp, 1.0)


@dataclass(frozen=True)
class on_plateau(Schedule):
    """Driven by the validation loss (after Dynamic Dropout, arXiv 2411.03236; the constants are ours).

    Every evaluation that does not improve on the best one by `threshold` raises the factor by `up`; every one that
    does lowers it by `down`; the factor stays between `low` and `high`. Without evaluations it stays at `start`.
    """

    start: float = 1.0
    up: float = 1.5
    down: float = 0.9
    low: float = 0.25
    high: float = 2.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        _not_negative(self, **{name: getattr(self, name) for name in self.__dataclass_fields__})
        if self.up < 1 or self.down > 1 or not self.low <= self.start <= self.high:
            raise ValueError(f"on_plateau needs up >= 1 >= down and low <= start <= high; got {self!r}.")

    @property
    def peak(self) -> float:  # type: ignore[override]
        return self.high

    def factor(self, progress: float, losses: Sequence[float]) -> float:
        factor, best = self.start, math.inf
        for loss in losses:
            improved = loss < best - self.threshold
            factor *= self.down if improved else self.up
            factor = min(max(factor, self.low), self.high)
            best = min(best, loss)
        return factor


SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls for cls in (constant, linear, exponential, cosine, curriculum, v_shape, two_phase, on_plateau)
}


def make_schedule(schedule: Schedule | str | Mapping[str, Mapping[str, Any]]) -> Schedule:
    """A [`Schedule`] from an object, from a name with its published (or our) defaults, or from `{name: settings}`.

    Raises:
        `ValueError`: for an unknown name or a value out of range. `TypeError`: for an unknown setting, or no schedule.
    """
    if isinstance(schedule, Schedule):
        return schedule
    name: Any = schedule
    settings: Mapping[str, Any] = {}
    if isinstance(schedule, Mapping) and len(schedule) == 1:
        [(name, settings)] = schedule.items()
    if not isinstance(name, str) or not isinstance(settings, Mapping):
        raise TypeError(
            f"schedule must be a name ({', '.join(SCHEDULES)}), {{name: settings}} or a Schedule, got "
            f"{type(schedule).__name__}."
        )
    if name not in SCHEDULES:
        raise ValueError(f"Unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}.")
    names = [f.name for f in fields(SCHEDULES[name])]  # type: ignore[arg-type]
    if unknown := [setting for setting in settings if setting not in names]:
        raise TypeError(f"schedule {name} has no setting {unknown[0]!r}. Settings: {', '.join(names)}.")
    return SCHEDULES[name](**settings)


def model_step(model: nn.Module, step: int, total: int, losses: Sequence[float] = ()) -> None:
    """Set every scheduled rate of `model` for `step` of `total`. Call it before each step of a hand-written loop.

    Args:
        model (`nn.Module`): a patched model; one without schedules is left as it is.
        step (`int`): optimizer steps done so far.
        total (`int`): optimizer steps of the whole run.
        losses (sequence of `float`, *optional*): validation losses so far, oldest first, for `on_plateau`.
    """
    from .seams.attention import gates

    for gate in gates(model):
        if gate.schedule is not None:
            for part in gate.rates():
                part.factor = gate.schedule(step, total, losses)


class ScheduleCallback(TrainerCallback):
    """Drives the schedules from a `Trainer`, and checks after the first step that every patch really ran.

    Example:

    ```python
    trainer = Trainer(model=patch_model(model, "drophead", schedule="v_shape"), callbacks=[ScheduleCallback()], ...)
    ```
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        model_step(model, state.global_step, state.max_steps, losses)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._checked = False

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self._checked:
            from .attaching import check_ran

            self._checked = True
            check_ran(model)
