"""Dynamic dropout: whatever dropout is there, on a schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from hf_reg.base import Patch, check_choice, check_range
from hf_reg.schedules import Schedule
from hf_reg.seams.dropout import PlaceGate, refuse_flex
from hf_reg.sites.layers import DropoutSite


__all__ = ["DynamicDropout"]


@dataclass(frozen=True)
class DynamicDropout(Patch):
    """Dynamic dropout: every dropout that is there moves with training by a schedule: the model's own, what
    `set_dropout` added, and that of `ffn_dropout` and the like.

    From *Enhancing Transformer Training Efficiency with Dynamic Dropout* (2024, arXiv 2411.03236), which lowers the
    rate of a GPT by a line, by an exponential or as the validation loss improves: `schedule="linear"`,
    `"exponential"` or `"on_plateau"`. The paper publishes no constants, and its experiments are one character-level
    data set: ours are in `hf_reg/schedules.py`. *Curriculum Dropout* (ICCV 2017, arXiv 1703.06229) goes the other way,
    from no dropout up to the full rate: `schedule="curriculum"`. The two contradict each other; compare them on your
    task.

    The rate of a place is its own one, or `p`, times the schedule's factor. Rates and configuration come back with
    `unpatch_model`. Attach it after `set_dropout` and after the patches that it shall move. A number that a forward
    hands to a function (BART, OPT) is a constant for `torch.compile`, which then compiles again for every rate.

    Args:
        p (`float`, *optional*): the rate at factor 1, in [0, 1). None: each place keeps its own, and those at 0 are
            left alone.
        kinds (`str`, *optional*, defaults to `"all"`): `"attention"` (probabilities), `"hidden"` (residual branches
            and embeddings), `"ffn"` (activations) or `"all"`.
        layers, submodel: see [`Patch`].
        schedule: see [`Patch`]; `"linear"` is the first of the paper, down to 0.
    """

    name: ClassVar[str] = "dynamic_dropout"
    formula: ClassVar[str] = "p_t = p f(t), f the schedule: 1 - t / T, exp(-k t / T), 1 - exp(-10 t / T), ..."
    seam: ClassVar[str] = "dropout"
    acts_on: ClassVar[str] = "of the chosen kind with a rate above 0 (give p, or set_dropout first)"
    rate_field: ClassVar[str] = "p"
    KINDS: ClassVar[tuple[str, ...]] = ("all", "attention", "hidden", "ffn")

    p: float | None = None
    kinds: str = "all"
    schedule: Schedule | str | None = field(default="linear", kw_only=True)

    def __post_init__(self) -> None:
        if self.p is not None:
            check_range("dynamic_dropout", "p", self.p, 0, 1)
        check_choice("dynamic_dropout", "kinds", self.kinds, self.KINDS)
        super().__post_init__()

    def accepts(self, site: Any) -> bool:
        if not isinstance(site, DropoutSite) or self.kinds not in ("all", site.kind):
            return False
        return self.p is not None or site.rate > 0

    def check(self, model: nn.Module, site: DropoutSite) -> None:
        refuse_flex(self.name, site)
        peak = self.schedule.peak if isinstance(self.schedule, Schedule) else 1.0
        if not site.rate * peak < 1 and self.p is None:
            raise ValueError(
                f"dynamic_dropout: {site.path} has rate {site.rate:g}; times the highest factor of the schedule "
                f"({peak:g}) it is not below 1. Lower the rate or that factor, or give p."
            )

    def gate(self, site: DropoutSite) -> PlaceGate:
        return PlaceGate(self, site.how)
