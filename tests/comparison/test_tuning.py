"""The search is the same each time, goes on where it was stopped, and finds what is there to find."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from hf_reg.comparison.measures import Diverged
from hf_reg.comparison.methods import KNOWN, Method, read_methods
from hf_reg.comparison.tuning import best_params, search
from hf_reg.runs.errors import RunError
from hf_reg.runs.sections import read_section


def method() -> Method:
    return read_methods(["tlm"], [], learning_rate=0.01, bare=True)["tlm"]


class Bowl:
    """A loss with its minimum at a rate of 0.35 and a learning rate of 0.02, which falls over five points."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, settings: dict[str, Any], seed: int, report: Callable[[int, float], bool]) -> float | None:
        self.asked.append(settings)
        rate = settings["patches"]["tlm"]["rate"]
        loss = (rate - 0.35) ** 2 + math.log(settings["train"]["learning_rate"] / 0.02) ** 2 + 0.01 * (seed % 2)
        return None if any(report(10 * step, loss + 1 / step) for step in range(1, 5)) else loss


def run(loss: Any, done: Any = (), trials: int = 12, note: Any = lambda _: None, seeds: Any = (100, 101)) -> Any:
    settings = method().settings(None)
    return search(
        "tlm", method(), settings, trials=trials, seeds=seeds, learning_rate=0.01, loss=loss, done=done, note=note
    )


def test_the_first_trial_has_the_defaults_and_the_best_is_better() -> None:
    records = run(Bowl(), trials=30)
    assert records[0]["params"] == {"train.learning_rate": 0.01, "patches.tlm.rate": 0.1}
    best = best_params(records)
    assert abs(best["patches.tlm.rate"] - 0.35) < 0.2 and 0.014 < best["train.learning_rate"] < 0.028
    complete = [one for one in records if one["state"] == "complete"]
    assert min(one["value"] for one in complete) < records[0]["value"] and len(complete) < len(records)
    assert all(len(one["values"]) <= 4 for one in records)  # of the first seed alone
    pruned = next(one for one in records if one["state"] == "pruned")
    assert pruned["value"] is None and 0 < len(pruned["values"]) <= 4 and pruned["values"][0]["step"] == 10


def test_it_goes_on_where_it_was_stopped() -> None:
    whole = run(Bowl())
    for known in (1, 4, 11):
        later, noted = Bowl(), []
        assert run(later, done=whole[:known], note=noted.append) == whole
        assert [one["number"] for one in noted] == list(range(known, 12))
        first = later.asked[0]
        assert first["train"]["learning_rate"] == whole[known]["params"]["train.learning_rate"]
    untouched = Bowl()
    assert run(untouched, done=whole) == whole and not untouched.asked


def test_the_value_is_the_mean_over_seeds() -> None:
    one, two = run(Bowl(), trials=1, seeds=[100])[0]["value"], run(Bowl(), trials=1)[0]["value"]
    assert two == pytest.approx(one + 0.005)


def test_trials_that_diverge_do_not_count_and_other_errors_end_it() -> None:
    def steep(settings: dict[str, Any], seed: int, report: Any) -> float:
        if settings["train"]["learning_rate"] > 0.01:
            raise Diverged("eval_loss is nan")
        return 1.0

    records = run(steep)
    assert {"failed", "complete"} == {one["state"] for one in records}
    assert best_params(records)["train.learning_rate"] <= 0.01
    assert run(steep, done=records[:6]) == records
    with pytest.raises(RunError, match="all 6 trials diverged"):
        best_params([one for one in records if one["state"] == "failed"][:1] * 6)

    def broken(*_: Any) -> float:
        raise OSError("no space left")

    with pytest.raises(OSError):
        run(broken)


def test_whole_numbers_and_choices() -> None:
    ranges = {"adapter.r": {"low": 1, "high": 8}, "adapter.gamma": {"choices": [0.1, 0.2]}}
    given = read_section(Method, KNOWN["sorsa"] | {"search": ranges})
    found = search(
        "sorsa", given, given.settings(None), trials=8, seeds=[1], learning_rate=0.1, done=(), note=lambda _: None,
        loss=lambda settings, *_: abs(settings["adapter"]["r"] - 5) + settings["adapter"]["gamma"],
    )  # fmt: skip
    assert all(
        type(one["params"]["adapter.r"]) is int and one["params"]["adapter.gamma"] in (0.1, 0.2) for one in found
    )
