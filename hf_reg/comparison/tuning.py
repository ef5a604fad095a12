"""The search for a method's settings: Optuna's TPE, and successive halving over the points of a trial's curve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..runs.errors import RunError, one_line
from .measures import Diverged
from .methods import Method, Range, with_params


__all__ = ["best_params", "search"]

HALVING = 2  # of two trials that reach a point of the curve one goes on; Optuna's 4 would stop most at five points
START = 3  # a third of the trials is drawn at random before TPE takes over; we chose it (Optuna's 10 may be all)

Loss = Callable[[dict[str, Any], int, Callable[[int, float], bool]], float | None]


def _suggest(trial: Any, ranges: Mapping[str, Range]) -> dict[str, Any]:
    found = {}
    for key, one in ranges.items():
        if one.choices is not None:
            found[key] = trial.suggest_categorical(key, one.choices)
        else:
            whole = isinstance(one.low, int) and isinstance(one.high, int)
            suggest = trial.suggest_int if whole else trial.suggest_float
            found[key] = suggest(key, one.low, one.high, log=one.log)
    return found


def _defaults(settings: Mapping[str, Any], ranges: Mapping[str, Range], learning_rate: float) -> dict[str, Any]:
    """The method's own settings, as far as they are in range: what the first trial tries."""
    found = {}
    for key, one in ranges.items():
        value: Any = settings
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None and key == "train.learning_rate":
            value = learning_rate
        inside = (
            value in one.choices if one.choices is not None else value is not None and one.low <= value <= one.high
        )
        if inside:
            found[key] = value
    return found


def search(
    name: str,
    method: Method,
    settings: Mapping[str, Any],
    *,
    trials: int,
    seeds: Sequence[int],
    learning_rate: float,
    loss: Loss,
    done: Sequence[Mapping[str, Any]],
    note: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """The trials of a method, as `trials.jsonl` has them; the same ones whenever it is asked for the same.

    A trial is judged by its mean loss over the seeds. Under the first seed it stops where half of the trials that came
    as far were better.

    Args:
        method ([`Method`]): with the ranges to search.
        settings (mapping): of the method, plain values, what the search does not change.
        loss (`Callable`):
            From settings, a seed, and what takes a step and a loss and says whether to stop, to the loss at the end.
        done (sequence of `dict`): trials of an earlier run, which are not repeated.
        note (`Callable`): takes every further one.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=max(trials // START, 2)),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=HALVING),
    )
    study.enqueue_trial(_defaults(settings, method.ranges, learning_rate))
    known = {one["number"]: dict(one) for one in done}
    records: list[dict[str, Any]] = []
    for number in range(trials):
        trial = study.ask()
        params = _suggest(trial, method.ranges)
        record = known.get(number)
        if record is None:
            record = {"method": name, "number": number, "params": params}
            record |= _tried(trial, with_params(settings, params), seeds, loss)
            note(record)
        else:
            for place, value in enumerate(record["values"], start=1):
                trial.report(value["loss"], place)
                trial.should_prune()  # leaves its marks in the study
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        study.tell(trial, record["value"] if record["state"] == "complete" else None, state=states[record["state"]])
        records.append(record)
    return records


def _tried(trial: Any, settings: dict[str, Any], seeds: Sequence[int], loss: Loss) -> dict[str, Any]:
    values: list[dict[str, float]] = []

    def report(step: int, found: float) -> bool:
        values.append({"step": step, "loss": found})
        trial.report(found, len(values))
        return trial.should_prune()

    losses: list[float] = []
    for seed in seeds:
        try:
            found = loss(settings, seed, report if not losses else lambda *_: False)
        except Diverged as error:  # a rate too high, for one: another trial may do better
            return {"values": values, "state": "failed", "value": None, "error": one_line(error)}
        if found is None:
            return {"values": values, "state": "pruned", "value": None}
        losses.append(found)
    return {"values": values, "state": "complete", "value": sum(losses) / len(losses)}


def best_params(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of the trial with the lowest loss.

    Raises:
        [`RunError`]: if no trial came to its end.
    """
    complete = [one for one in records if one["state"] == "complete"]
    if not complete:
        raise RunError(f"all {len(records)} trials diverged; the last one: {records[-1].get('error')}")
    return dict(min(complete, key=lambda one: one["value"])["params"])
