"""What every regularizer is made of: a `Patch` (frozen settings) and a `Gate` (its live part inside one module), or a
`Penalty` (one more term of the loss)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .checks import check_choice, check_range
from .draws.units import drop_units
from .schedules import Schedule, make_schedule


if TYPE_CHECKING:
    from .seams.masks import BlockView, TokenView


__all__ = ["Gate", "Patch", "Penalty", "RateGate", "check_choice", "check_range"]


@dataclass(frozen=True)
class Patch:
    """Settings of one regularizer, and how it attaches. Subclass it to add a method (CONTRIBUTING.md).

    Args:
        layers (`str`, `int` or sequence of `int`, *optional*, defaults to `"all"`):
            Which layers of every sub-model to patch: `"all"`, a slice (`"6:"`, `"::2"`, `"-4:"`), an index, or a list
            of indices; negative ones count from the end.
        submodel (`str` or sequence of `str`, *optional*, defaults to `"all"`):
            Which sub-models: `"all"`, `"encoder"`, `"decoder"`, `"text"`, `"vision"`, `"audio"`, or a module path
            such as `"model.vision_tower"`.
        schedule (`str` or [`~hf_reg.schedules.Schedule`], *optional*):
            Factor on the rate over training. `None` keeps it constant.
    """

    name: ClassVar[str] = ""
    formula: ClassVar[str] = ""  # for model cards
    seam: ClassVar[str] = "attention"  # where it acts: a key of `SEAMS` (sites/finding.py)
    acts_on: ClassVar[str] = "attention"  # in words, what `accepts` accepts
    rate_field: ClassVar[str | None] = None  # the setting that the schedule multiplies
    drops: ClassVar[str] = ""  # the kind of dropout that it is, "hidden" or "ffn", for `dynamic_dropout`
    in_eval: ClassVar[bool] = False  # True only for deterministic interventions such as `head_mask`
    replaces_parameters: ClassVar[bool] = False  # so wrappers and optimizers have to be made after patching
    trial: ClassVar[Mapping[str, Any]] = {}  # settings with which the test matrix tries a patch without a rate
    tolerance: ClassVar[float] = 0.0  # relative: how far the matrix lets its start be from the model; 0: not one bit

    layers: str | int | Sequence[int] = field(default="all", kw_only=True)
    submodel: str | Sequence[str] = field(default="all", kw_only=True)
    schedule: Schedule | str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.name:
            raise TypeError(
                f"{type(self).__name__} has no `name`; a Patch subclass must set the class attribute `name`."
            )
        for key in ("layers", "submodel"):
            value = getattr(self, key)
            if isinstance(value, list):
                object.__setattr__(self, key, tuple(value))
        if self.schedule is not None:
            object.__setattr__(self, "schedule", make_schedule(self.schedule))
            if self.rate_field is None:
                raise ValueError(
                    f"{self.name} has no rate, so schedule={self.schedule!r} would do nothing; leave it out."
                )
            peak = self.schedule.peak * (getattr(self, self.rate_field) or 0.0)  # type: ignore[union-attr]
            if not peak < 1:
                raise ValueError(
                    f"{self.name}: {self.rate_field}={getattr(self, self.rate_field)} times the highest factor of the "
                    f"schedule ({self.schedule.peak}) is {peak:g}; keep it below 1."  # type: ignore[union-attr]
                )

    def settings(self) -> dict[str, Any]:
        """The settings as a dict, in the order of the signature: what describes and rebuilds this patch."""
        own = [f.name for f in fields(self) if f.name not in Patch.__dataclass_fields__]
        return {name: getattr(self, name) for name in (*own, "layers", "submodel", "schedule")}

    def accepts(self, site: Any) -> bool:
        """Whether this method is meant for `site` (TLM: self-attention only)."""
        return True

    def check(self, model: nn.Module, site: Any) -> None:
        """Raise `ValueError` when the method cannot work at `site`; called for every site before anything changes."""

    def warning(self, sites: Sequence[Any]) -> str:
        """What the user should know before the patch is attached to `sites`, or ""."""
        return ""

    def gate(self, site: Any) -> Gate:
        """The live part for `site`."""
        raise NotImplementedError(f"{type(self).__name__} must define `gate(site)`.")


class Gate(nn.Module):
    """The live part of a patch inside one module. It owns no parameter and no persistent buffer.

    At the attention seam a gate may do three things, each a no-op here:

    - `hide`, `hide_blocks`: take keys out of the attention mask (declared by `hides`),
    - `scales`: multiply the output of each head,
    - `wrap`: stand around the attention function itself.

    At the FFN and residual seams it may `transform` what passes.
    """

    hides: ClassVar[bool] = False  # whether `hide` does anything
    schedule: Schedule | None = None  # that of the patch, or one of the gate's own
    replaces_dropout: bool = False  # whether the model's attention-probability dropout is off while this gate is on
    ran = False  # whether it has acted (of a trainer: since its last log); not told where `transform` is compiled

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self.patch = patch
        self.schedule = patch.schedule  # type: ignore[assignment]

    def enabled(self) -> bool:
        """Whether the gate acts on this call."""
        return self.training or self.patch.in_eval

    def hide(self, view: TokenView) -> torch.Tensor:
        """The attention mask of `view` without the keys that this gate takes away: (B, 1 | H, Tq, Tk) bool."""
        raise NotImplementedError(f"{type(self).__name__} hides keys, so it must define `hide(view)`.")

    def hidden_tokens(self, view: TokenView) -> tuple[torch.Tensor, torch.Tensor, str] | None:
        """If all that this gate hides is whole tokens: `selected` and `self_masked`, (B, T) bool each, and `hide`, as
        in [`~hf_reg.patches.tlm.token_level_mask`]. It is asked instead of `hide` where no mask need be built."""
        return None

    def hide_blocks(self, view: BlockView) -> Any:
        """The same for flex attention: a `mask_mod(batch, head, query, key)` that is combined with the model's own."""
        raise NotImplementedError(f"{type(self).__name__} hides keys: for flex attention, define `hide_blocks(view)`.")

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The attention function to call instead of `function`, with its signature."""
        return function

    def scales(self, batch: int, heads: int, device: torch.device) -> torch.Tensor | None:
        """Factor on each head's output, (B | 1, H) float, or None for no change."""
        return None

    def transform(self, states: torch.Tensor) -> torch.Tensor:
        """What goes on in place of `states`: the activation of an FFN, or the output of a residual branch, of any
        leading shape (experts see their own tokens only)."""
        return states

    def attach(self, model: nn.Module, site: Any) -> None:
        """Called once the gate stands at `site`: the place to leave hooks (`SeamHook`s owned by the gate)."""

    def detach(self, model: nn.Module) -> None:
        """Called when the gate is taken off: the place to undo what `attach` did beside leaving hooks."""

    def notes(self) -> str:
        """Anything that `describe` should add for this module, such as what is computed another way."""
        return ""

    def rates(self) -> Iterator[RateGate]:
        """The parts of this gate with a rate that a schedule may drive."""
        return iter(())

    def extra_repr(self) -> str:
        return repr(self.patch)


class RateGate(nn.Dropout, Gate):
    """A gate with a random rate: an `nn.Dropout` with `.p`, so that everything that switches dropout off reaches it.

    The rate in force, `p * factor`, lives in the non-persistent buffer `rate`, so that a schedule never recompiles the
    model. `active` is False at rate 0: then nothing is drawn and the model runs as if unpatched.
    """

    rate: torch.Tensor

    def __init__(self, patch: Patch) -> None:
        Gate.__init__(self, patch)
        self.inplace = False
        self._p, self._factor, self.active = 0.0, 1.0, False
        self.register_buffer("rate", torch.zeros(()), persistent=False)
        self.p = getattr(patch, patch.rate_field or "")

    @property
    def p(self) -> float:
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        check_range(self.patch.name, "p", value, 0, 1, closed=True)
        self._p = float(value)
        self._refresh()

    @property
    def factor(self) -> float:
        """What the schedule multiplies `p` with; `p` itself stays what the user, or `disable_dropout`, set."""
        return self._factor

    @factor.setter
    def factor(self, value: float) -> None:
        self._factor = float(value)
        self._refresh()

    def _refresh(self) -> None:
        rate = min(self._p * self._factor, 1.0)
        self.active = rate > 0
        with torch.no_grad():
            self.rate.fill_(rate)

    def _apply(self, fn: Any, recurse: bool = True) -> RateGate:
        super()._apply(fn, recurse)  # moves the buffer; a cast to bf16 or a `to_empty` must not change the rate
        self.rate = torch.full((), self._p * self._factor, dtype=torch.float32, device=self.rate.device)
        return self

    def enabled(self) -> bool:
        return self.training and self.active

    def rates(self) -> Iterator[RateGate]:
        yield self

    def drop(self, states: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
        """Dropout at the rate in force, what stays scaled by 1 / (1 - rate).

        Args:
            states (`torch.Tensor`): of any shape.
            shape (sequence of `int`, *optional*): of the mask, where it is shared along some dimensions (size 1).
        """
        if shape is None and not torch.compiler.is_compiling():
            return drop_units(states, min(self._p * self._factor, 1.0))
        keep = torch.rand(states.shape if shape is None else shape, device=states.device) >= self.rate
        return states * (keep / (1 - self.rate).clamp(min=1e-12)).to(states.dtype)

    def extra_repr(self) -> str:
        return f"p={self._p:g}, factor={self._factor:g}, {self.patch!r}"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Never called by the seam; the identity, so that a stray call does no harm."""
        return input


@dataclass(eq=False)
class Penalty:
    """One more term of the loss: `weight * schedule * __call__(model, inputs, outputs)`. Subclass it to add a method.

    Args:
        weight (`float`): what the term is multiplied with.
        schedule (`str` or [`~hf_reg.schedules.Schedule`], *optional*):
            Factor on the weight over training. `None` keeps it constant.
        scope (`str` or sequence of `str`, *optional*, defaults to `"trainable"`):
            For penalties on parameters, which ones: `"trainable"`, `"all"`, `"adapters"` (those of PEFT), or glob
            patterns of parameter names such as `"*.query.weight"`. Parameters without gradient never count.
        name (`str`, *optional*): its name in the logs, if the method's own is taken.
    """

    NAME: ClassVar[str] = ""
    FORMULA: ClassVar[str] = ""  # for model cards
    NEEDS: ClassVar[frozenset[str]] = frozenset()  # of NEEDED: what `outputs` has to hold beside the loss
    ON_PARAMETERS: ClassVar[bool] = False  # looks at parameters only: the same for every micro-batch of a step
    NEEDED: ClassVar[tuple[str, ...]] = (
        "logits", "hidden_states", "attentions", "teacher", "second_pass", "example_ids",
    )  # fmt: skip

    weight: float = field(default=1.0, kw_only=True)
    schedule: Schedule | str | None = field(default=None, kw_only=True)
    scope: str | Sequence[str] = field(default="trainable", kw_only=True)
    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        self.name = self.name or self.NAME or type(self).__name__.lower()
        check_range(self.name, "weight", self.weight, 0, float("inf"))
        if self.schedule is not None:
            self.schedule = make_schedule(self.schedule)
        unknown = self.NEEDS - set(self.NEEDED)
        if unknown:
            raise TypeError(f"{self.name}: NEEDS {sorted(unknown)} is not known; use {', '.join(self.NEEDED)}.")

    def prepare(self, model: nn.Module) -> None:
        """Called once, with the unwrapped model as it is before the first step: the place to remember an anchor."""

    def undecayed(self, model: nn.Module) -> Collection[str]:
        """Names of parameters that a trainer leaves out of weight decay, which this penalty stands in for."""
        return ()

    def strength(self, step: int, total: int, losses: Sequence[float] = ()) -> float:
        """The weight in force at `step` of `total`."""
        return self.weight * (self.schedule(step, total, losses) if self.schedule is not None else 1.0)  # type: ignore

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        """The unweighted term.

        Args:
            model (`nn.Module`): the unwrapped model.
            inputs (mapping of `str` to `torch.Tensor`): the micro-batch, labels included, and `example_ids` if needed.
            outputs ([`~transformers.utils.ModelOutput`]): of the model in this very step, with what `NEEDS` names;
                `outputs.teacher` and `outputs.second_pass` are outputs of further forwards.

        Returns:
            `torch.Tensor` of shape `()`: a mean over examples or a value of the parameters, not a sum over the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `__call__(model, inputs, outputs)`.")
