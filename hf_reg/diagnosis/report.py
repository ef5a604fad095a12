"""The verdict on a run, as text, as plain values and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..tables import Shown
from .advice import advise
from .curves import Curves, shares_of
from .findings import Finding, find_in_curves
from .reading import RunRecord, read_run
from .regularizers import find_in_regularizers, untold


if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["OverfitReport", "diagnose"]

VERDICTS = {  # of the first kind that was found
    "not finite": "diverges",
    "diverging": "diverges",
    "over-fitting": "over-fits",
    "learns too little": "learns too little",
}


@dataclass
class OverfitReport(Shown):
    """What [`diagnose`] found; `print` it, or leave it to the notebook.

    Attributes:
        verdict (`str`): `"diverges"`, `"over-fits"`, `"learns too little"`, `"no sign of over-fitting"`, or `"cannot
            tell"` without evaluations.
        train_loss (`float`): of the task at the end, a mean over the logs of an evaluation's span.
        eval_loss, best_loss (`float`, *optional*): held out, at the end and at its lowest; `None` without evaluations.
        gap (`float`, *optional*): held-out loss minus training loss at the end.
        rise (`float`, *optional*): by how much the held-out loss has risen since its best, relative to it.
        best_step (`int`, *optional*), last_step (`int`): of the evaluation with the lowest loss, and of the last log.
        shares (`dict`): each penalty's share of the training loss, and of the gradient as `"gradient of <name>"`.
        next_steps (`list` of `str`): settings to try with the reason, the most promising first.
        findings (`list` of [`Finding`]): what was seen, each with evidence and reason.
        unknown (`list` of `str`): what the run does not tell.
        run ([`RunRecord`]): what was read.
        curves ([`Curves`]): its losses.
    """

    verdict: str
    train_loss: float
    eval_loss: float | None
    best_loss: float | None
    gap: float | None
    rise: float | None
    best_step: int | None
    last_step: int
    shares: dict[str, float]
    next_steps: list[str]
    findings: list[Finding]
    unknown: list[str]
    run: RunRecord = field(repr=False)
    curves: Curves = field(repr=False)

    @property
    def headline(self) -> str:
        """The verdict, and the kinds of the further problems."""
        others = [one.kind for one in self.findings if one.problem and one.kind not in VERDICTS]
        return ", ".join(dict.fromkeys([self.verdict, *others]))

    def as_json(self) -> dict[str, Any]:
        """Plain values, for machines; without the logs themselves."""
        left = ("run", "curves")
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in left}
        return {
            **found, "headline": self.headline, "findings": [asdict(one) for one in self.findings],
            "source": self.run.source, "held_out": self.curves.held_out_name, "remarks": self.run.remarks,
        }  # fmt: skip

    def figure(self) -> Figure:
        """Losses over steps with what was found, and the penalties' shares where there are any; for `savefig`.

        Raises:
            `ImportError`: without matplotlib.
        """
        from ..report.diagnosis import draw_diagnosis

        return draw_diagnosis(self)

    def _table(self) -> RenderableType:
        table = Table(title=Text(f"{self.run.name}: {self.headline}", style="bold"), title_justify="left")
        table.add_column("")
        table.add_column("value", justify="right")
        table.add_row("training loss (task), end", f"{self.train_loss:.4f}")
        if self.eval_loss is not None:
            name = "" if self.curves.held_out_name == "eval_loss" else f" ({self.curves.held_out_name})"
            table.add_row(f"held-out loss{name}, end", f"{self.eval_loss:.4f}")
            table.add_row("gap", f"{self.gap:+.4f}")
            table.add_row("best held-out loss", f"{self.best_loss:.4f} (step {self.best_step} of {self.last_step})")
            table.add_row("risen since", f"{self.rise:+.1%}")
        for name, share in self.shares.items():
            table.add_row(f"share of {name}", f"{share:.2%}")
        parts: list[RenderableType] = [table]
        if self.findings:
            seen = Table(title="What the logs show", title_justify="left")
            for title in ("", "finding", "reason"):
                seen.add_column(title, overflow="fold")
            for one in self.findings:
                kind = Text(one.kind, style="bold red" if one.problem else "")
                seen.add_row(kind, Text(f"{one.text}."), Text(f"{one.reason}."))
            parts.append(seen)
        parts += [Text("Next, the most promising first:")]
        parts += [Text(f"{number}. {text}") for number, text in enumerate(self.next_steps, 1)]
        if self.unknown:
            parts += [Text("It cannot be told:"), *(Text(f"- {text}") for text in self.unknown)]
        parts += [Text(f"Note: {text}") for text in self.run.remarks]
        return Group(*parts)


def diagnose(run: Any) -> OverfitReport:
    """Judge a run by its logs and its configuration.

    A run *over-fits* when its held-out loss has risen by more than 2 % since its best while the training loss went on
    falling; it *learns too little* when the training loss fell by less than 2 %; it *diverges* when a loss is not
    finite, or gives up more than half of what it had learned. A *plateau* is a third of the run or more, to its end,
    in which neither loss moves by more than 2 % of what was learned. A penalty *dominates* with more than half of the
    loss (of the gradient, where `gradient_shares` are logged), and *does nothing* below 1 %. All are our choices. What
    patches and dropout did is in the logs of a [`RegularizedTrainer`] only.

    Args:
        run (`str`, `Path`, [`~transformers.Trainer`], its `state` or `log_history`):
            An output folder (its newest whole `trainer_state.json` is read) or a run in memory, with at least two
            training logs; also of trainers that know nothing of hf_reg.

    Returns:
        [`OverfitReport`].

    Raises:
        `ValueError`: if there are too few logs to tell, or a folder cannot be read. `TypeError`: for something without
            logs.

    Example:

    ```python
    report = diagnose("out")
    print(report)
    report.figure().savefig("diagnosis.png")
    ```
    """
    record = read_run(run)
    curves = Curves.of(record.history)
    if len(curves.train) < 2:
        raise ValueError(
            f"diagnose found {len(curves.train)} training logs and {len(curves.held_out)} evaluations; it needs two "
            f"of each. Set logging_steps and eval_strategy='steps' (with eval_steps) or 'epoch'. ({record.source})"
        )
    shares = shares_of(record.history)
    findings = [*find_in_curves(record, curves), *find_in_regularizers(record, curves, shares)]
    judged = len(curves.held_out) > 1
    otherwise = "no sign of over-fitting" if judged else "cannot tell"
    verdict = next((VERDICTS[one.kind] for one in findings if one.kind in VERDICTS), otherwise)
    best, last = (curves.best, curves.last) if judged else (None, None)
    return OverfitReport(
        verdict, curves.end, last and last[1], best and best[1], last and last[1] - curves.end,
        curves.rise if judged else None, best and best[0], curves.last_step, shares,
        advise(verdict, findings, record, curves), findings, list(untold(record, curves)), record, curves,
    )  # fmt: skip
