"""Which regularizers did their work: patches that ran, dropout that was on, penalties that weigh."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from ..training.activity import MODE
from .curves import TOLERANCE, Curves, penalty_names
from .findings import Finding, percent
from .reading import RunRecord


__all__ = ["DOMINANT", "WEAK", "find_in_regularizers", "untold"]

WEAK = 0.01  # share of the loss below which a penalty is not felt: our choice
DOMINANT = 0.5  # share of the loss above which there is more penalty than task
STILL = 1e-3  # relative change of a penalty's value that is none: our choice


def _logged(run: RunRecord, name: str) -> list[tuple[int, float]]:
    return [(int(log.get("step", 0)), log[name]) for log in run.history if name in log and math.isfinite(log[name])]


def _values(run: RunRecord, name: str) -> list[float]:
    return [value for _, value in _logged(run, name)]


def find_in_regularizers(run: RunRecord, curves: Curves, shares: Mapping[str, float]) -> Iterator[Finding]:
    """What the logs of a [`RegularizedTrainer`] and the configuration show."""
    evaluating = list(_evaluation_mode(run))
    yield from evaluating
    for name in _patches(run):
        yield from _patch(run, name, bool(evaluating))
    yield from _dropout(run, bool(evaluating))
    for name in sorted({*run.penalties, *penalty_names(run.history)}):
        yield from _penalty(run, curves, name, shares, bool(evaluating))


def _evaluation_mode(run: RunRecord) -> Iterator[Finding]:
    if low := [(step, share) for step, share in _logged(run, MODE) if share < 1]:
        step, share = low[0][0], sum(value for _, value in low) / len(low)
        some = "" if share == 0 else f" in {percent(1 - share)} of the steps"
        yield Finding(
            "evaluation mode",
            f"the model was in evaluation mode at training steps{some}, as logged from step {step} to {low[-1][0]}",
            "dropout and patches do nothing in evaluation mode, and penalties are left out of the loss",
            step=step, evidence={"training_mode": share},
        )  # fmt: skip


def _patches(run: RunRecord) -> list[str]:
    logged = {key[4:] for log in run.history for key in log if key.startswith("ran_")}
    return sorted({*run.patches, *logged})


def _patch(run: RunRecord, name: str, evaluating: bool) -> Iterator[Finding]:
    ran, rates = _logged(run, f"ran_{name}"), _values(run, f"rate_{name}")
    most, rate = max((share for _, share in ran), default=None), max(rates, default=None)
    if rate == 0:
        yield Finding(
            "patch without rate", f"{name} had the rate 0 in every step that was logged",
            f"its settings or its schedule say so{_settings(run, name)}", about=name,
        )  # fmt: skip
    elif most == 0:
        why = "the model was in evaluation mode" if evaluating else "the model's forward did not go through it"
        yield Finding(
            "patch never ran", f"{name} never acted, at a rate of {rate:g}" if rate else f"{name} never acted",
            f"none of its modules ran it in any step: {why}", about=name, evidence={"ran": 0.0},
        )  # fmt: skip
    elif most is not None:
        end = next((at for at, (_, share) in enumerate(reversed(ran)) if share > 0), 0)
        if end > 1 and (not rates or rates[-1] > 0):
            yield Finding(
                "patch stopped", f"{name} acted until step {ran[-end - 1][0]}, and not after it",
                "its rate was not 0: " + ("the model was in evaluation mode" if evaluating else "it was taken off"),
                step=ran[-end][0], about=name,
            )  # fmt: skip
        elif most < 1:
            yield Finding(
                "patch partly ran", f"{name} acted in {most:.0%} of its modules at most between two logs",
                "the forward does not go through the others, such as a branch for other inputs",
                problem=False, about=name, evidence={"ran": most},
            )  # fmt: skip


def _settings(run: RunRecord, name: str) -> str:
    given = {key: value for key, value in run.patches.get(name, {}).items() if key not in ("layers", "submodel")}
    return f": {', '.join(f'{key}={value!r}' for key, value in given.items())}" if given else ""


def _dropout(run: RunRecord, evaluating: bool) -> Iterator[Finding]:
    rates, on = _values(run, "dropout_rate"), _values(run, "dropout_on")
    configured = {name: rate for name, rate in (run.dropout or {}).items() if rate > 0}
    said = ", ".join(f"{name}={rate:g}" for name, rate in configured.items())
    if rates and max(rates) == 0 and configured:
        yield Finding(
            "dropout never ran", f"the model's dropout had the rate 0 in training; its configuration has {said}",
            "something set the rates of its modules to 0 (p=0, disable_dropout) and left the configuration as it was",
            evidence={"dropout_rate": 0.0, **configured},
        )  # fmt: skip
    elif rates and max(rates) > 0 and on and max(on) == 0:
        why = "the model was in evaluation mode" if evaluating else "its modules were in evaluation mode"
        yield Finding(
            "dropout never ran", f"the model's dropout, of the mean rate {max(rates):.3g}, was off in every step", why,
            evidence={"dropout_rate": max(rates), "dropout_on": 0.0},
        )  # fmt: skip
    elif (rates and max(rates) == 0) or (not rates and run.dropout and not configured):
        fields = f" ({', '.join(run.dropout)})" if run.dropout else ""
        yield Finding(
            "no dropout", f"the model has no dropout of its own: every rate is 0{fields}",
            "its configuration says so" if run.dropout else "its modules say so", problem=False,
        )  # fmt: skip


def _penalty(
    run: RunRecord, curves: Curves, name: str, shares: Mapping[str, float], evaluating: bool
) -> Iterator[Finding]:
    values = _values(run, f"loss_{name}")
    if not any(values):
        found = "is 0 in all of the logs" if values else "is in none of the logs, although the run names the penalty"
        why = "the model was in evaluation mode" if evaluating else "its weight or its schedule is 0"
        why = "there is nothing that it acts on" if values else f"it was never computed: {why}"
        yield Finding("penalty absent", f"loss_{name} {found}", why, about=name)
        return
    loss, gradient = shares.get(name, 0.0), shares.get(f"gradient of {name}")
    felt = loss if gradient is None else gradient
    of = "loss" if gradient is None else "gradient"
    evidence = {"share": loss} | ({} if gradient is None else {"gradient_share": gradient})
    change = (max(values) - min(values)) / max(abs(value) for value in values)
    learned = curves.end < curves.first - TOLERANCE * abs(curves.first)
    also = f"; {percent(loss)} of the loss" if gradient is not None else ""
    if felt > DOMINANT:
        hint = "" if gradient is not None else " (gradient_shares=True would log its share of the gradient as well)"
        yield Finding(
            "penalty dominates", f"{name} is {percent(felt)} of the {of}{also}",
            f"there is more of it than of the task{hint}", about=name, evidence=evidence,
        )  # fmt: skip
    elif felt < WEAK:
        yield Finding(
            "penalty does nothing", f"{name} is {percent(felt)} of the {of}{also}",
            f"below {WEAK:.0%} the task decides alone", about=name, evidence=evidence,
        )  # fmt: skip
    elif learned and len(values) >= 4 and change < STILL:
        yield Finding(
            "penalty does nothing", f"loss_{name} stayed what it was, within {percent(change)}",
            f"it is {percent(felt)} of the {of}, but the run did not move it while the task was learned",
            about=name, evidence=evidence | {"change": change},
        )  # fmt: skip


def untold(run: RunRecord, curves: Curves) -> Sequence[str]:
    """What cannot be known of this run, and what would tell."""
    found = []
    if len(curves.held_out) < 2:
        found.append(
            f"Over-fitting: there are {len(curves.held_out)} evaluations, and it takes two. Set eval_strategy='steps' "
            "(with eval_steps) or 'epoch'."
        )
    logged = {key for log in run.history for key in log}
    if "dropout_rate" not in logged and (run.dropout is None or any(run.dropout.values())):
        said = "" if run.dropout is not None else ", nor is there a configuration of the model to read"
        found.append(
            f"Whether dropout ran: the logs do not say{said}. A RegularizedTrainer logs it (dropout_rate, dropout_on)."
        )
    silent = [name for name in run.patches if f"ran_{name}" not in logged]
    if silent:
        found.append(
            f"Whether {', '.join(silent)} acted: the logs do not say. A RegularizedTrainer logs it (ran_{silent[0]}) "
            "unless the model is compiled."
        )
    return found
