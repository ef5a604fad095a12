"""What differences between methods are worth: intervals, tests of paired differences, and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


__all__ = ["Difference", "differences", "fewest_seeds", "holm", "interval", "paired_p"]

RESAMPLES = 9999  # of bootstrap and test; scipy's default
EXACT = 13  # seeds up to which every assignment of signs is tried: 2 ** 13 are fewer than RESAMPLES


@dataclass(frozen=True)
class Difference:
    """A method against the reference on one measure and size: mean of the differences under the same seeds, their
    bootstrap interval, p-value and that after Holm's correction, and what it says."""

    mean: float
    low: float | None
    high: float | None
    p: float
    p_holm: float
    verdict: str


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | tuple[None, None]:
    """The bootstrap interval of the mean: BCa, and percentiles where that is not defined; `None` for one value.

    The random numbers are the same each time.
    """
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return None, None
    if np.ptp(found) == 0:
        return float(found[0]), float(found[0])
    for method in ("BCa", "percentile"):
        result = stats.bootstrap(
            (found,), np.mean, confidence_level=level, n_resamples=RESAMPLES, method=method,
            rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        if np.isfinite([result.low, result.high]).all():
            break
    return float(result.low), float(result.high)


def paired_p(differences: Sequence[float]) -> float:
    """The two-sided p-value of a sign-flip (paired permutation) test of the mean.

    If two methods do not differ, each difference is as likely to have the other sign: the test then errs at most as
    often as it says, whatever the distribution, which Student's t keeps only for normal ones. Up to 13 seeds all signs
    are tried, beyond that 9999 draws of them.
    """
    found = np.asarray(differences, dtype=float)
    if len(found) < 2 or not found.any():
        return 1.0
    result = stats.permutation_test(
        (found, np.zeros_like(found)), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=np.inf if len(found) <= EXACT else RESAMPLES, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm, 1979): the chance of any false one of a family stays below the level."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min((len(p_values) - rank) * p_values[index], 1.0))
        adjusted[index] = largest
    return adjusted


def fewest_seeds(family: int, alpha: float) -> int:
    """The least number of seeds with which the test can find the clearest difference of a family at all."""
    count = 2
    while family * 2.0 ** (1 - count) >= alpha:
        count += 1
    return count


def differences(
    values: dict[str, dict[int, float]], reference: str, *, alpha: float, higher_is_better: bool
) -> dict[str, Difference]:
    """Every method against the reference, on one measure and one size: the family of Holm's correction.

    Args:
        values (`dict`): by method and seed.
        reference (`str`): a method.
        alpha (`float`): below which a corrected p-value is a difference.

    Returns:
        `dict`: by method; those that share no seed with the reference are not in it.
    """
    base = values.get(reference, {})
    paired = {
        method: [own[seed] - base[seed] for seed in sorted(own) if seed in base]
        for method, own in values.items() if method != reference
    }  # fmt: skip
    paired = {method: found for method, found in paired.items() if found}
    p_values = [paired_p(found) for found in paired.values()]
    made = {}
    for (method, found), p, corrected in zip(paired.items(), p_values, holm(p_values), strict=True):
        mean = float(np.mean(found))
        verdict = "no difference shown"
        if corrected < alpha:
            verdict = "better" if (mean > 0) == higher_is_better else "worse"
        low, high = interval(found)
        made[method] = Difference(mean, low, high, p, corrected, verdict)
    return made
