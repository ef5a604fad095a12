"""Which setting to try next, and why: the most promising first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..patching import known_patches
from .curves import Curves
from .findings import Finding, percent
from .reading import RunRecord


__all__ = ["advise"]

EARLY = 0.2  # of the run: a best that early speaks for a learning rate that is too high; our choice


def advise(verdict: str, findings: Sequence[Finding], run: RunRecord, curves: Curves) -> list[str]:
    """Sentences of a setting and its reason."""
    found = [*_repairs(findings, run)]
    kinds = {finding.kind: finding for finding in findings}
    dominant = [one for one in findings if one.kind == "penalty dominates"]
    weak = [one for one in findings if one.kind == "penalty does nothing"]
    lighter = [_weight(run, one, 0.1) for one in dominant]
    if verdict == "diverges":
        found += lighter
        found += [*_calmer(curves)]
    elif verdict == "learns too little":
        found += lighter
        found.append(f"Train longer or raise the learning rate{_rate(curves, 3)}; the training loss has hardly moved.")
        found += _rates(run, 0.5, "Halve", "it may leave too little to learn from")
    elif verdict == "over-fits":
        found += [*_against_over_fitting(run, curves, weak, kinds)]
        found += lighter
    else:
        found += lighter + [_weight(run, one, 10) for one in weak]
        if "plateau" in kinds:
            found += [*_off_the_plateau(kinds["plateau"], curves)]
    if not found and verdict == "cannot tell":
        return ["Evaluate during training: eval_strategy='steps' with eval_steps, or 'epoch'."]
    return found or ["Nothing: keep these settings, or train longer while the held-out loss still falls."]


def _repairs(findings: Sequence[Finding], run: RunRecord) -> Iterator[str]:
    """What does not work as it was meant to comes first: other advice builds on it."""
    for one in findings:
        if one.kind == "evaluation mode":
            yield (
                "Find what calls model.eval() in training (compute_loss, a callback, a train() of the model's own) "
                "and take it out: nothing regularizes this run."
            )
        elif one.kind == "patch without rate":
            field = getattr(known_patches().get(one.about), "rate_field", None) or "its rate"
            yield f"Give {one.about} a rate ({field}) or a schedule above 0: at 0 it does nothing."
        elif one.kind in ("patch never ran", "patch stopped") and "evaluation mode" not in one.reason:
            yield f"Look what {one.about} reaches (print(describe(model)), hf-reg inspect): no module ran it."
        elif one.kind == "dropout never ran" and "evaluation mode" not in one.reason:
            yield "Set the rates that are meant on the loaded model: set_dropout(model, hidden=0.1, attention=0.1)."
        elif one.kind == "penalty absent" and "schedule" in one.reason:
            yield f"Give {one.about} a weight and a schedule above 0, or take it out: it is no part of the loss."
        elif one.kind == "skipped steps":
            yield "Lower the learning rate, or compute in bf16 or fp32: steps that are not finite were left out."


def _number(settings: Mapping[str, object], name: str | None) -> float | None:
    value = settings.get(name) if name else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _weight(run: RunRecord, finding: Finding, factor: float) -> str:
    now = _number(run.penalties.get(finding.about, {}), "weight")
    change = f", from {now:g} to {now * factor:g}" if now else ""
    of = "gradient" if "gradient_share" in finding.evidence else "loss"
    share = percent(finding.evidence["gradient_share" if of == "gradient" else "share"])
    if factor < 1:
        return f"Lower the weight of {finding.about} to a tenth{change}: at {share} of the {of} it outweighs the task."
    return f"Raise the weight of {finding.about} tenfold{change}: at {share} of the {of} it is hardly felt."


def _rate(curves: Curves, factor: float) -> str:
    peak = curves.peak_rate
    return f", from {peak:.2g} to {peak * factor:.2g}" if peak else ""


def _rates(run: RunRecord, factor: float, verb: str, reason: str) -> list[str]:
    """A sentence on the rates of the patches, if there are any."""
    known, changes = known_patches(), []
    for name, settings in run.patches.items():
        now = _number(settings, getattr(known.get(name), "rate_field", None))
        if now:
            changes.append(f"{name} ({now:g} to {min(now * factor, 0.9):g})")
    return [f"{verb} the rate of {', '.join(changes)}: {reason}."] if changes else []


def _calmer(curves: Curves) -> Iterator[str]:
    yield f"Lower the learning rate to a third{_rate(curves, 1 / 3)}: its steps lead away from what was found."
    yield "Warm up (warmup_ratio=0.1) and clip gradients (max_grad_norm=1.0): single large steps throw a run off."


def _against_over_fitting(
    run: RunRecord, curves: Curves, weak: Sequence[Finding], kinds: Mapping[str, Finding]
) -> Iterator[str]:
    best, last = curves.best[0], curves.last_step
    yield (
        f"Stop near step {best}: callbacks=[early_stopping(args)] keeps the best checkpoint, whose held-out loss is "
        f"{percent(curves.rise / (1 + curves.rise) if curves.rise > -1 else curves.rise)} lower."
    )
    if not run.patches:
        yield 'Regularize attention: patches="tlm" (rate 0.1), or patches="drophead" (p 0.2): no patch is on.'
    else:
        raised = _rates(run, 1.5, "Raise", f"the gap is {curves.last[1] - curves.end:+.2f} in spite of it")
        yield from raised
        other = next((name for name in ("tlm", "drophead") if name not in run.patches), None)
        if other is not None:
            yield f'Add patches="{other}": it drops what {", ".join(run.patches)} leaves.'
    if "no dropout" in kinds:
        yield "Switch the model's own dropout on: set_dropout(model, hidden=0.1, attention=0.1); every rate is 0."
    for one in weak:
        yield _weight(run, one, 10)
    if not run.penalties and not weak:
        yield 'Hold the weights near the pretrained ones: penalties={"l2_sp": 0.01}.'
    if best <= EARLY * last:
        yield f"Halve the learning rate{_rate(curves, 0.5)}: the best step came after {best / last:.0%} of the run."
    if not run.weight_decay:
        yield f"Decay the weights, weight_decay=0.01: it is 0{'' if run.weight_decay == 0 else ', unless you set it'}."
    yield "Label more data: what is learned by heart is what there is too little of; no setting replaces it."


def _off_the_plateau(plateau: Finding, curves: Curves) -> Iterator[str]:
    share = plateau.evidence.get("rate_share")
    rest = curves.last_step - (plateau.step or 0)
    yield f"Stop near step {plateau.step}: the {rest} steps after it changed little."
    if share is not None and share < 0.1:
        yield "If the loss should go lower: more steps, or a schedule that decays later; this one was used up."
    else:
        yield f"If the loss should go lower: let the learning rate decay (lr_scheduler_type='cosine'){_why(curves)}."


def _why(curves: Curves) -> str:
    peak = curves.peak_rate
    return f", or start at {peak / 3:.2g}; steps of this size move around what they look for" if peak else ""
