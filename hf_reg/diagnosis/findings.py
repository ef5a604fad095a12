"""What a run's logs show: each finding with its numbers and the reason for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from .curves import TOLERANCE, Curves, Point
from .reading import RunRecord


__all__ = ["Finding", "find_in_curves", "percent"]

LOST = 0.5  # of what was learned, given up again: the run diverges; our choice
LARGE = 0.1  # relative rise of a loss that is no chance; our choice
LEAST_TAIL = 1 / 3  # of the run, in which nothing moves: shorter rests are those of any decay; our choice
TAIL_LOGS = 4  # evaluations, so that each half has two
DECAYED = 0.1  # of the highest learning rate; our choice


@dataclass(frozen=True)
class Finding:
    """One thing that the logs show.

    Args:
        kind (`str`): such as `"over-fitting"`, for programs.
        text (`str`): what it is, with its numbers.
        reason (`str`): why it is thought to be so, or what it means.
        problem (`bool`, *optional*, defaults to `True`): False for what need not be changed.
        step (`int`, *optional*): from which on.
        about (`str`, *optional*): the patch or the penalty.
        evidence (`dict`, *optional*): the numbers.
    """

    kind: str
    text: str
    reason: str
    problem: bool = True
    step: int | None = None
    about: str = ""
    evidence: dict[str, float] = field(default_factory=dict)


def percent(share: float) -> str:
    """Two digits that count, also of very small shares."""
    return f"{share:.0%}" if abs(share) >= 0.1 else f"{100 * share:.2g} %".replace(" ", "")


def find_in_curves(run: RunRecord, curves: Curves) -> Iterator[Finding]:
    """What the losses show."""
    yield from _not_finite(run)
    yield from _skipped(run)
    diverging = list(_diverging(curves))
    yield from diverging
    if diverging:
        return
    flat = curves.end > curves.first - TOLERANCE * abs(curves.first)
    if len(curves.held_out) > 1 and curves.above_best(curves.last[1], TOLERANCE) and curves.end < curves.first:
        yield _over_fitting(curves)
    elif flat:
        yield Finding(
            "learns too little", f"the training loss went from {curves.first:.4f} to {curves.end:.4f}",
            f"a fall of less than {TOLERANCE:.0%} is no learning",
            evidence={"first": curves.first, "end": curves.end},
        )  # fmt: skip
    else:
        yield from _plateau(curves)


def _not_finite(run: RunRecord) -> Iterator[Finding]:
    last_norm: float | None = None
    for log in run.history:
        names = [name for name, value in log.items() if "loss" in name and not math.isfinite(value)]
        norm = log.get("grad_norm")
        if norm is not None and last_norm is not None and not (math.isfinite(norm) or math.isfinite(last_norm)):
            names.append("grad_norm")  # a single one is usual: loss scaling of fp16 looks for its scale that way
        last_norm = norm if norm is not None else last_norm
        if names:
            step = int(log.get("step", 0))
            yield Finding(
                "not finite", f"{', '.join(names)} is not a finite number from step {step} on",
                "NaN or infinity in a loss or a gradient spreads to all weights with the next step; Trainer leaves "
                "such losses out of its logs (logging_nan_inf_filter), so that later ones look harmless",
                step=step,
            )  # fmt: skip
            return


def _skipped(run: RunRecord) -> Iterator[Finding]:
    if skipped := max((log.get("skipped_steps", 0.0) for log in run.history), default=0.0):
        yield Finding(
            "skipped steps", f"{skipped:.0f} steps were left out, since a term was not finite",
            "on_nonfinite='skip' keeps the run alive, but not what makes the numbers too large",
            evidence={"skipped_steps": skipped},
        )  # fmt: skip


def _diverging(curves: Curves) -> Iterator[Finding]:
    windows, judged = curves.windows, len(curves.held_out) > 1
    step, low = min(windows, key=lambda point: point[1])
    end, first = windows[-1][1], curves.first
    least = max(LOST * (first - low), LARGE * max(abs(first), abs(low)))
    if not judged:  # held-out examples are the same at each evaluation; batches differ
        least = max(least, 4 * curves.noise(step) / math.sqrt(curves.span))
    if end - low > least and (not judged or curves.above_best(curves.last[1], LARGE)):
        yield Finding(
            "diverging", f"the training loss rose from {low:.4f} at step {step} to {end:.4f} at the end",
            "more than half of what it had learned is lost, "
            + (f"and the held-out loss rose, {curves.rise:+.0%}" if judged else "and by more than batches differ"),
            step=step, evidence={"lowest": low, "end": end, "first": first},
        )  # fmt: skip


def _over_fitting(curves: Curves) -> Finding:
    (step, best), (_, last) = curves.best, curves.last
    since = next(at for at, loss in curves.held_out if at > step and curves.above_best(loss, TOLERANCE))
    before = curves.train_between(step - curves.last_step // len(curves.held_out), step)
    then = fmean(before) if before else curves.first
    return Finding(
        "over-fitting",
        f"from step {step} of {curves.last_step}: the held-out loss was lowest there, {best:.4f}, and is {last:.4f} "
        f"at the end, {curves.rise:+.1%}; above {TOLERANCE:.0%} since step {since}",
        f"the training loss went on from {then:.4f} to {curves.end:.4f} meanwhile: the gap grew from "
        f"{best - then:+.4f} to {last - curves.end:+.4f}",
        step=step,
        evidence={
            "best": best, "last": last, "rise": curves.rise, "above_tolerance_from": float(since),
            "train_then": then, "train_end": curves.end, "gap_then": best - then, "gap_end": last - curves.end,
        },
    )  # fmt: skip


def _moved(points: Sequence[Point]) -> float:
    """Difference of the means of both halves."""
    half = len(points) // 2
    return abs(fmean(loss for _, loss in points[:half]) - fmean(loss for _, loss in points[half:]))


def _plateau(curves: Curves) -> Iterator[Finding]:
    """From which step on neither loss moves: over the rest of the run, and over each shorter rest."""
    levels = [loss for _, loss in curves.windows] + [loss for _, loss in curves.held_out]
    fall = max(curves.first, *levels[:1], *(loss for _, loss in curves.held_out[:1])) - min(levels)
    marks = curves.held_out if len(curves.held_out) >= 2 * TAIL_LOGS else curves.windows
    start: int | None = None
    for at in range(len(marks) - TAIL_LOGS, 0, -1):
        step = marks[at][0]
        train = [point for point in curves.train if point[0] >= step]
        held_out = [point for point in curves.held_out if point[0] >= step]
        error = 3 * curves.noise(curves.last_step) * math.sqrt(4 / len(train)) if train else 0.0
        rests = len(train) >= TAIL_LOGS and _moved(train) <= max(TOLERANCE * fall, min(error, 0.1 * fall))
        if len(held_out) >= 2:
            losses = [loss for _, loss in held_out]
            rests &= _moved(held_out) <= TOLERANCE * fall and max(losses) - min(losses) <= 3 * TOLERANCE * fall
        if not rests:
            break
        start = step
    if start is None or curves.last_step - start < LEAST_TAIL * curves.last_step:
        return
    rate, peak = curves.rate_at(start), curves.peak_rate
    share = rate / peak if rate is not None and peak else None
    if share is None:
        why = "the logs do not say how high the learning rate was"
    elif share < DECAYED:
        why = f"the learning rate had decayed to {percent(share)} of its highest ({peak:.2g}) by then"
    else:
        why = f"not for lack of a learning rate: it was still {percent(share)} of its highest ({peak:.2g}) there"
    yield Finding(
        "plateau",
        f"from step {start} of {curves.last_step} neither training nor held-out loss moves by more than "
        f"{TOLERANCE:.0%} of what was learned ({fall:.4f})" if curves.held_out else
        f"from step {start} of {curves.last_step} the training loss does not move by more than {TOLERANCE:.0%} of "
        f"what was learned ({fall:.4f})",
        why, problem=False, step=start,
        evidence={"fall": fall, "train_end": curves.end} | ({"rate_share": share} if share is not None else {}),
    )  # fmt: skip
