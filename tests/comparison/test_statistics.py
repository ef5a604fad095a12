"""Intervals, tests and Holm's correction, against scipy and by hand; and how often they err where nothing differs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hf_reg.comparison.statistics import differences, fewest_seeds, holm, interval, paired_p
from hf_reg.comparison.step_costs import ratios


def test_sign_flips_by_hand() -> None:
    assert paired_p([1.0, 1.0, 1.0]) == 2 / 8  # +++ and --- of eight
    assert paired_p([1.0, 2.0, -3.0]) == 1.0
    assert paired_p([3.0, 2.0, -1.0]) == 4 / 8  # 3+2-1 and 3+2+1, and their opposites
    assert paired_p([0.0, 0.0]) == 1.0 and paired_p([5.0]) == 1.0


@pytest.mark.parametrize("count", [5, 10])
def test_sign_flips_as_scipy_s_wilcoxon_does_on_ranks(count: int) -> None:
    draw = np.random.default_rng(count)
    ranks = draw.permutation(np.arange(1, count + 1)) * draw.choice([-1, 1], count)  # then the two tests are one
    assert paired_p(ranks) == pytest.approx(stats.wilcoxon(ranks, method="exact").pvalue)


def test_many_seeds_are_sampled_and_agree_with_students_t() -> None:
    found = np.random.default_rng(0).normal(0.5, 1, 40)
    assert paired_p(found) == paired_p(found) == pytest.approx(stats.ttest_1samp(found, 0).pvalue, abs=0.01)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


def test_intervals() -> None:
    found = np.random.default_rng(1).exponential(size=12)
    wanted = stats.bootstrap(
        (found,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert interval(found) == (wanted.low, wanted.high) and wanted.low < found.mean() < wanted.high
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5) and interval([1.0]) == (None, None)
    assert interval([0.0, 1.0]) == (0.0, 1.0)


def test_verdicts() -> None:
    base = {seed: 0.5 + 0.01 * seed for seed in range(10)}
    values = {
        "reference": base,
        "up": {seed: value + 0.1 + 0.001 * seed for seed, value in base.items()},
        "same": dict(base),
        "noise": {seed: value + (-1) ** seed * 0.1 for seed, value in base.items()},
        "elsewhere": {77: 3.0},
    }
    found = differences(values, "reference", alpha=0.05, higher_is_better=True)
    assert list(found) == ["up", "same", "noise"]
    up = found["up"]
    assert up.verdict == "better" and up.p == 2 / 1024 and up.p_holm == 6 / 1024
    assert up.mean == pytest.approx(0.1045) and up.low < up.mean < up.high
    assert {found[name].verdict for name in ("same", "noise")} == {"no difference shown"}
    assert differences(values, "reference", alpha=0.05, higher_is_better=False)["up"].verdict == "worse"


def test_pairs_are_of_one_seed() -> None:
    values = {"a": {0: 1.0, 1: 5.0, 2: 9.0}, "b": {2: 9.5, 1: 5.5}}
    assert differences(values, "a", alpha=0.05, higher_is_better=True)["b"].mean == pytest.approx(0.5)


def test_fewest_seeds_is_where_the_test_can_first_reject() -> None:
    for family in (1, 4, 6):
        fewest = fewest_seeds(family, 0.05)
        for count, verdict in ((fewest - 1, "no difference shown"), (fewest, "better")):
            values = {"reference": dict.fromkeys(range(count), 0.0), "far": dict.fromkeys(range(count), 1.0)}
            values |= {f"same {i}": dict(values["reference"]) for i in range(family - 1)}
            assert differences(values, "reference", alpha=0.05, higher_is_better=True)["far"].verdict == verdict


MANY = pytest.param(10, 2000, marks=pytest.mark.slow)


@pytest.mark.parametrize(("seeds", "count"), [(5, 60), (10, 150), MANY])
def test_nothing_is_found_where_nothing_differs(seeds: int, count: int) -> None:
    """One method three times, under other seeds: any verdict of the family is false. Skewed noise, as losses have, and
    accuracies on few rows, which tie."""
    draw, wrong = np.random.default_rng(seeds), 0
    for repetition in range(count):
        shape = draw.gamma(1.0, size=(3, seeds)) if repetition % 2 else draw.binomial(20, 0.8, (3, seeds)) / 20
        values = {str(method): dict(enumerate(row)) for method, row in enumerate(shape)}
        found = differences(values, "0", alpha=0.05, higher_is_better=True)
        wrong += any(one.verdict != "no difference shown" for one in found.values())
    assert wrong <= stats.binom.ppf(0.999, count, 0.05)
    assert (wrong > 0) == (seeds >= fewest_seeds(2, 0.05))  # it is not that the test says nothing at all


def test_ratios_by_hand() -> None:
    found = ratios({"a": [1.0, 2.0, 4.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0, 3.0, 1.5]}, "a")
    assert found[0] == {"method": "a", "ratio": 1.0, "low": 1.0, "high": 1.0, "steps": 5}
    assert found[1] == {"method": "b", "ratio": 1.5, "low": 1.0, "high": 2.0, "steps": 5}
