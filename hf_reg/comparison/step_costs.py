"""What a training step of each method costs: all trained side by side in one process, a step of each in turn."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Any

import torch
from transformers import TrainerCallback

from .running import Runner


__all__ = ["ratios", "step_costs"]

WARM_UP = 3  # steps of each that are not counted; we chose it
PATIENCE = 0.5  # seconds between looks at whether another has failed


class _Turns:
    """Whose step it is: in every round each once, in an order drawn anew."""

    def __init__(self, count: int, rounds: int, seed: int) -> None:
        draw = random.Random(seed)
        self.order = [one for _ in range(rounds) for one in draw.sample(range(count), count)]
        self.place = 0
        self.failed: BaseException | None = None
        self.changed = threading.Condition()

    def wait(self, mine: int) -> None:
        with self.changed:
            while self.order[self.place] != mine:
                if self.failed is not None:
                    raise RuntimeError("another method failed")
                self.changed.wait(PATIENCE)

    def pass_on(self) -> None:
        with self.changed:
            self.place += 1
            self.changed.notify_all()


class _Clock(TrainerCallback):
    """Times the steps of one trainer, each in its turn."""

    def __init__(self, turns: _Turns, mine: int) -> None:
        self.turns, self.mine = turns, mine
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.turns.wait(self.mine)
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self.turns.pass_on()


def ratios(seconds: Mapping[str, Sequence[float]], reference: str) -> list[dict[str, Any]]:
    """The median and the quartiles of each method's step time over the reference's in the same round."""
    found = []
    for method, own in seconds.items():
        paired = [a / b for a, b in zip(own, seconds[reference], strict=True)]
        low, middle, high = quantiles(paired, n=4, method="inclusive")
        found.append({"method": method, "ratio": middle, "low": low, "high": high, "steps": len(paired)})
    return found


def step_costs(
    runner: Runner, settings: Mapping[str, Mapping[str, Any]], size: int, seed: int
) -> list[dict[str, Any]]:
    """The cost of a step of each method, as `costs.jsonl` has it.

    Args:
        runner ([`Runner`]): of the comparison.
        settings (mapping): of each method.
        size, seed (`int`): of the sample that all train on.

    Raises:
        Whatever the first method that fails raises.
    """
    rounds = runner.plan.compare.cost_steps + WARM_UP
    turns = _Turns(len(settings), rounds, seed)
    clocks = [_Clock(turns, place) for place in range(len(settings))]

    with tempfile.TemporaryDirectory() as folder:
        trainers = []
        for one, clock in zip(settings.values(), clocks, strict=True):
            trainer = runner.trainer(one, size, seed, folder, runner.samples.held_out, max_steps=rounds)
            trainer.add_callback(clock)
            trainers.append(trainer)

        def train(trainer: Any) -> None:
            try:
                trainer.train()
            except BaseException as error:  # of a thread: raised below, in the one that waits for it
                turns.failed = turns.failed or error

        threads = [threading.Thread(target=train, args=(trainer,)) for trainer in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if turns.failed is not None:
        raise turns.failed
    seconds = {method: clock.seconds[WARM_UP:] for method, clock in zip(settings, clocks, strict=True)}
    return ratios(seconds, runner.plan.compare.reference)
