"""The loss of a preference run as a table of formulas."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from ..losses.rpo import BASES, DEFAULTS, FORMULAS
from ..tables import Shown


__all__ = ["LossDescription"]

SOURCES = {
    "cumulative": "arXiv 2405.16436; authors' zephyr-7b-beta recipe",
    "average": "appendix F; authors' train_rpo.sh",
    "trl": 'TRL: loss_type=["sigmoid", "sft"]; its index of papers',
}


@dataclass(frozen=True)
class LossDescription(Shown):
    """Every variant of [`rpo_loss`] with its published values, and the one of a run with its own.

    Args:
        variant, base (`str`), beta, eta, label_smoothing (`float`): of [`RPOConfig`].
        formula (`str`): the loss of this run in symbols and numbers.
    """

    variant: str
    base: str
    beta: float
    eta: float
    label_smoothing: float
    formula: str

    def _table(self) -> Table:
        smoothed = f", label smoothing {self.label_smoothing}" if self.label_smoothing else ""
        caption = (
            f"L_pref = mean_b( {BASES[self.base]} ){smoothed}\n"
            "h = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l); eta = 0 is DPO"
        )
        table = Table(title=f"RPO, variant {self.variant!r}", title_justify="left", caption=caption,
                      caption_justify="left")  # fmt: skip
        for name in ("", "variant", "loss", "beta", "eta", "published values"):
            table.add_column(name, overflow="fold")
        for name, formula in FORMULAS.items():
            own, (beta, eta) = name == self.variant, DEFAULTS[name]
            numbers = (self.beta, self.eta) if own else (beta, eta)
            source = f"beta = {beta}, eta = {eta} ({SOURCES[name]})"
            table.add_row("*" if own else "", name, formula, *map(str, numbers), source, style="bold" if own else None)
        return table
