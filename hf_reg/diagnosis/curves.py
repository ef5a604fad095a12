"""The losses of a run in numbers that single batches do not sway."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median


__all__ = ["TOLERANCE", "Curves", "Point", "penalty_names", "shares_of"]

TOLERANCE = 0.02  # of the best held-out loss: our choice, about what two seeds differ by on small data

OF_TASK = ("loss_task", "loss_dpo", "loss_sft")  # the last two as RPOTrainer logs them: its parts

Point = tuple[int, float]


@dataclass(frozen=True)
class Curves:
    """Loss over steps, of training (the task alone, where the penalties are told apart) and held out.

    Args:
        train, held_out (`list` of (step, loss)): finite values only; held out, the first one of each step.
        rates (`list` of (step, learning rate)): as logged.
        held_out_name (`str`): the metric that `held_out` is.
    """

    train: list[Point]
    held_out: list[Point]
    rates: list[Point] = field(default_factory=list)
    held_out_name: str = "eval_loss"

    @classmethod
    def of(cls, history: Sequence[Mapping[str, float]]) -> Curves:
        names = {key for log in history for key in log}
        several = sorted(name for name in names if re.fullmatch(r"eval_.+_loss", name))
        name = "eval_loss" if "eval_loss" in names or not several else several[0]
        train = [(_step(log), log.get("loss_task", log["loss"])) for log in history if "loss" in log]
        held_out = {_step(log): log[name] for log in reversed(history) if name in log}
        return cls(
            [point for point in train if math.isfinite(point[1])],
            [point for point in sorted(held_out.items()) if math.isfinite(point[1])],
            [
                (_step(log), log["learning_rate"])
                for log in history
                if math.isfinite(log.get("learning_rate", math.nan))
            ],
            name,
        )

    @property
    def span(self) -> int:
        """How many training logs count as one: those between two evaluations; a tenth of all where there are none."""
        return max(len(self.train) // (len(self.held_out) or 10), 1)

    @property
    def windows(self) -> list[Point]:
        """Means of `span` training losses each, the last ones whole, at the step of their last."""
        span, start = self.span, len(self.train) % self.span
        parts = [self.train[at : at + span] for at in range(start, len(self.train), span)]
        return [(part[-1][0], fmean(loss for _, loss in part)) for part in parts]

    @property
    def first(self) -> float:
        return fmean(loss for _, loss in self.train[: self.span])

    @property
    def end(self) -> float:
        return fmean(loss for _, loss in self.train[-self.span :])

    def noise(self, until: int) -> float:
        """Standard deviation of one training log around the curve, up to a step: from the median difference of
        neighbours, which few large jumps do not sway, for normal noise."""
        losses = [loss for step, loss in self.train if step <= until]
        steps = [abs(b - a) for a, b in zip(losses, losses[1:], strict=False)]
        return median(steps) / (0.6745 * math.sqrt(2)) if steps else 0.0

    @property
    def best(self) -> Point:
        return min(self.held_out, key=lambda point: point[1])

    @property
    def last(self) -> Point:
        return self.held_out[-1]

    @property
    def last_step(self) -> int:
        return max(self.train[-1][0], self.held_out[-1][0] if self.held_out else 0)

    @property
    def rise(self) -> float:
        """By how much the held-out loss has risen since its best, relative to it, or to the beginning if it was 0."""
        best = self.best[1]
        return (self.last[1] - best) / (abs(best) or self.start or 1.0)

    @property
    def start(self) -> float:
        """How large the loss is before anything is learned."""
        return max(abs(self.first), *(abs(loss) for _, loss in self.held_out[:1]), 0.0)

    def above_best(self, loss: float, tolerance: float) -> bool:
        """Whether a held-out loss is worse than the best by more than `tolerance` of it. Below a tenth of the loss at
        the beginning (our choice) it is of that tenth: from 0.0001 to 0.0002 nothing has become worse."""
        return loss - self.best[1] > tolerance * max(abs(self.best[1]), 0.1 * self.start)

    @property
    def peak_rate(self) -> float | None:
        return max((rate for _, rate in self.rates), default=None)

    def rate_at(self, step: int) -> float | None:
        """The learning rate in force at `step`."""
        return next((rate for at, rate in reversed(self.rates) if at <= step), None)

    def train_between(self, after: int, until: int) -> list[float]:
        return [loss for step, loss in self.train if after < step <= until]


def _step(log: Mapping[str, float]) -> int:
    return int(log.get("step", 0))


def penalty_names(history: Sequence[Mapping[str, float]]) -> list[str]:
    """What stands beside the task in the loss."""
    return sorted({key[5:] for log in history for key in log if key.startswith("loss_") and key not in OF_TASK})


def shares_of(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each penalty's share of the training loss, and of the gradient as `"gradient of <name>"`."""
    logs = [{key: value for key, value in log.items() if math.isfinite(value)} for log in history if "loss" in log]
    names = penalty_names(logs)
    counted = [f"loss_{name}" for name in ("task", *names)]
    total = sum(abs(log.get(key, 0.0)) for log in logs for key in counted)
    shares = {name: sum(abs(log.get(f"loss_{name}", 0.0)) for log in logs) / total if total else 0.0 for name in names}
    for name in names:
        if seen := [log[f"share_{name}"] for log in logs if f"share_{name}" in log]:
            shares[f"gradient of {name}"] = fmean(seen)
    return shares
