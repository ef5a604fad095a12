"""`diagnose`: does this run over-fit, from when on, how much do its regularizers weigh, and what to try next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .tables import Shown


__all__ = ["OverfitReport", "diagnose"]

TOLERANCE = 0.02  # of the best held-out loss: our choice, about what two seeds differ by on small data
WEAK = 0.01  # share of the loss below which a penalty is not felt: our choice


@dataclass
class OverfitReport(Shown):
    """What [`diagnose`] found; `print` it, or leave it to the notebook.

    Attributes:
        verdict (`str`): `"over-fits"`, `"learns too little"` or `"no sign of over-fitting"`.
        gap (`float`): held-out loss minus training loss at the end.
        best_step, last_step (`int`): of the evaluation with the lowest loss, and of the last one.
        rise (`float`): by how much the held-out loss has risen since its best, relative to it.
        shares (`dict`): each penalty's share of the training loss, and of the gradient as `"gradient of <name>"`.
        next_steps (`list` of `str`): settings to try, the most promising first.
    """

    verdict: str
    train_loss: float
    eval_loss: float
    best_loss: float
    gap: float
    rise: float
    best_step: int
    last_step: int
    shares: dict[str, float] = field(default_factory=dict)
    next_steps: list[str] = field(default_factory=list)

    def _table(self) -> RenderableType:
        table = Table(title=f"Over-fitting: {self.verdict}", title_justify="left")
        table.add_column("")
        table.add_column("value", justify="right")
        table.add_row("training loss (task), end", f"{self.train_loss:.4f}")
        table.add_row("held-out loss, end", f"{self.eval_loss:.4f}")
        table.add_row("gap", f"{self.gap:+.4f}")
        table.add_row("best held-out loss", f"{self.best_loss:.4f} (step {self.best_step} of {self.last_step})")
        table.add_row("risen since", f"{self.rise:+.1%}")
        for name, share in self.shares.items():
            table.add_row(f"share of {name}", f"{share:.2%}")
        return Group(table, *(Text(f"{number}. {text}") for number, text in enumerate(self.next_steps, 1)))


def _history(run: Any) -> list[Mapping[str, float]]:
    state = getattr(run, "state", run)
    found = getattr(state, "log_history", state)
    if not isinstance(found, Iterable) or isinstance(found, (str, Mapping)):
        raise TypeError(f"diagnose expects a Trainer, its state or its log_history, got {type(run).__name__}.")
    return list(found)


def _shares(logs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({key for log in logs for key in log if key.startswith("loss_") and key != "loss_task"})
    total = sum(abs(log[key]) for log in logs for key in log if key.startswith("loss_"))
    shares = {
        name.removeprefix("loss_"): sum(abs(log.get(name, 0.0)) for log in logs) / total if total else 0.0
        for name in names
    }
    for name in list(shares):
        seen = [log[f"share_{name}"] for log in logs if f"share_{name}" in log]
        if seen:
            shares[f"gradient of {name}"] = sum(seen) / len(seen)
    return shares


def _advice(verdict: str, best: int, last: int, shares: Mapping[str, float], patches: Sequence[str]) -> list[str]:
    if verdict == "learns too little":
        strong = [name for name, share in shares.items() if share > 0.5 and not name.startswith("gradient")]
        weaken = [f"Lower the weight of {name}: it is most of the loss." for name in strong]
        return [*weaken, "Train longer or raise the learning rate; the training loss has hardly moved."]
    if verdict != "over-fits":
        return ["Nothing: keep these settings, or train longer while the held-out loss still falls."]
    advice = []
    if best < last:
        advice.append(f"Stop near step {best}: callbacks=[early_stopping(args)] keeps the best checkpoint.")
    if not patches:
        advice.append('Regularize attention: patches="tlm" (rate 0.1), or patches="drophead" (p 0.2).')
    else:
        advice.append(f"Raise the rate of {', '.join(patches)} by half, or add the other of tlm and drophead.")
    weak = [name for name, share in shares.items() if share < WEAK and not name.startswith("gradient")]
    for name in weak:
        advice.append(f"Raise the weight of {name} tenfold: at {shares[name]:.2%} of the loss it is hardly felt.")
    if not shares:
        advice.append('Hold the weights near the pretrained ones: penalties={"l2_sp": 0.01}.')
    return advice


def diagnose(run: Any) -> OverfitReport:
    """Judge a finished run by its logs.

    A run *over-fits* when its held-out loss has risen by more than 2 % since its best while the training loss went on
    falling; it *learns too little* when the training loss fell by less than 2 % (our choices).

    Args:
        run ([`~transformers.Trainer`], its `state` or `log_history`):
            With at least two training logs and two evaluations; of a [`RegularizedTrainer`] the task's own loss and
            the penalties are told apart.

    Returns:
        [`OverfitReport`].

    Raises:
        `ValueError`: if there are too few logs to tell. `TypeError`: for something without logs.
    """
    history = _history(run)
    train = [log for log in history if "loss" in log]
    held_out = [log for log in history if "eval_loss" in log]
    if len(train) < 2 or len(held_out) < 2:
        raise ValueError(
            f"diagnose found {len(train)} training logs and {len(held_out)} evaluations; it needs two of each. Set "
            "logging_steps and eval_strategy='steps' (with eval_steps) or 'epoch'."
        )
    losses = [log.get("loss_task", log["loss"]) for log in train]
    span = max(len(losses) // len(held_out), 1)  # single logs are of single batches: average over an evaluation's
    first, end = sum(losses[:span]) / span, sum(losses[-span:]) / span
    best = min(held_out, key=lambda log: log["eval_loss"])
    last = held_out[-1]
    rise = last["eval_loss"] / best["eval_loss"] - 1 if best["eval_loss"] > 0 else 0.0
    if rise > TOLERANCE and end < first:
        verdict = "over-fits"
    elif end > first * (1 - TOLERANCE):
        verdict = "learns too little"
    else:
        verdict = "no sign of over-fitting"
    shares = _shares(train)
    patches = [patch.name for patch in getattr(run, "_patches", ())]
    best_step, last_step = int(best.get("step", 0)), int(last.get("step", 0))
    return OverfitReport(
        verdict, end, last["eval_loss"], best["eval_loss"], last["eval_loss"] - end, rise, best_step, last_step,
        shares, _advice(verdict, best_step, last_step, shares, patches),
    )  # fmt: skip
