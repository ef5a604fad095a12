"""What was set, and the proof: which places really drop in training mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..tables import Shown


__all__ = ["DropoutReport", "DropoutRow"]

DROPPING = (F.dropout, torch.dropout, F.scaled_dot_product_attention, F.multi_head_attention_forward)
FORWARDS = 5  # tries of `verify`: a layer or an expert may be skipped at random in one forward


@dataclass(frozen=True)
class DropoutRow:
    """One place: a dropout module, a number that a forward passes to a function, or a module that was added."""

    kind: str
    path: str
    rate: float
    how: str  # "module", "number" or "added"
    dropped: bool | None = None  # None: not verified


@dataclass(frozen=True)
class DropoutReport(Shown):
    """Where dropout is, by kind. `print` it for a table; a notebook shows it as HTML; `verify` proves it.

    Args:
        model (`nn.Module`): the model.
        rows (sequence of [`DropoutRow`]): every place that was set; what a rate of 0 removed is not among them.
        uncovered (`dict[str, dict[str, int]]`): by kind, classes where dropout cannot be set (fused experts).
    """

    model: nn.Module = field(repr=False, compare=False)
    rows: Sequence[DropoutRow]
    uncovered: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def dropped(self) -> dict[str, tuple[int, int]]:
        """By kind: places seen to drop, and places listed with a rate above 0."""
        on = [row for row in self.rows if row.rate > 0]
        return {
            k: (sum(bool(r.dropped) for r in on if r.kind == k), n) for k, n in Counter(r.kind for r in on).items()
        }

    def verify(self, **inputs: Any) -> DropoutReport:
        """Run the model in training mode and see which places drop; flags and random state come back after it.

        For the time of the forward every place has a rate of its own (they differ by less than a millionth), and
        every call of dropout or of scaled dot-product attention is looked at: a rate that arrives names its place.
        Kernels outside torch's functions (FlashAttention) are not seen.

        Args:
            inputs: what the model is called with, on its device.

        Returns:
            [`DropoutReport`]: this report, with what dropped.

        Raises:
            `RuntimeError`: if a place that is listed with a rate above 0 did not drop.
        """
        marks: dict[float, DropoutRow] = {}
        with _training(self.model), _Recorder() as recorder:
            restore: list[tuple[Any, str, Any]] = []
            try:
                for number, row in enumerate(self.rows):
                    place = _locate(self.model, row)
                    if place is None or not getattr(*place) > 0:
                        continue
                    restore.append((*place, getattr(*place)))
                    mark = float(getattr(*place)) * (1 - (number + 1) * 1e-12)
                    marks[mark] = row
                    setattr(*place, mark)
                for _ in range(FORWARDS):
                    self.model(**inputs)
                    if recorder.rates.issuperset(marks):
                        break
            finally:
                for owner, name, value in restore:
                    setattr(owner, name, value)
        seen = {(row.kind, row.path) for mark, row in marks.items() if mark in recorder.rates}
        result = replace(self, rows=[replace(row, dropped=(row.kind, row.path) in seen) for row in self.rows])
        silent = [f"{row.path} ({row.kind}, {row.rate:g})" for row in result.rows if row.rate > 0 and not row.dropped]
        if silent:
            counts = ", ".join(f"{kind} {done} of {all_}" for kind, (done, all_) in result.dropped.items())
            raise RuntimeError(
                f"{len(silent)} places have a rate above 0 but did not drop: {', '.join(silent[:5])}"
                f"{', ...' if len(silent) > 5 else ''}. Dropped: {counts}. Either these inputs do not reach them, "
                "their rate was changed since set_dropout, or the model or its attention kernel does not use "
                "them: give inputs that run the whole model, call set_dropout again, or leave that kind out."
            )
        return result

    def _table(self) -> Table:
        lines = [
            f"Not covered, {kind}: {', '.join(f'{n} x {name}' for name, n in classes.items())}."
            for kind, classes in self.uncovered.items()
        ]
        table = Table(title=f"Dropout of {type(self.model).__name__}", title_justify="left", caption="\n".join(lines))
        for name in ("kind", "rate", "places", "how", "example", "seen to drop"):
            table.add_column(name, overflow="fold")
        groups: dict[tuple[str, float, str], list[DropoutRow]] = {}
        for row in self.rows:
            groups.setdefault((row.kind, row.rate, row.how), []).append(row)
        for (kind, rate, how), rows in groups.items():
            proof = (
                "not verified" if rows[0].dropped is None else f"{sum(bool(r.dropped) for r in rows)} / {len(rows)}"
            )
            table.add_row(kind, f"{rate:g}", str(len(rows)), how, rows[0].path, proof if rate else "off")
        return table


class _Recorder(TorchFunctionMode):
    """Collects the rates of dropout that arrive at torch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: set[float] = set()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPPING:
            training = kwargs.get("training", kwargs.get("train", True))
            if func in (F.dropout, torch.dropout) and len(args) > 2:
                training = args[2]
            if training:
                self.rates.update(value for value in (*args, *kwargs.values()) if type(value) is float)
        return func(*args, **kwargs)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode without a trace: no gradient, batch norms fixed, flags and random states restored."""
    flags = [(module, module.training) for module in model.modules()]
    used = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in used), "cuda")
    state = np.random.get_state()  # SpecAugment draws from numpy
    fork = torch.random.fork_rng(devices=[device.index for device in used], device_type=kind)
    try:
        with fork, torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.train()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            yield
    finally:
        np.random.set_state(state)
        for module, flag in flags:
            module.training = flag


def _locate(model: nn.Module, row: DropoutRow) -> tuple[nn.Module, str] | None:
    """The object and the attribute that hold the rate of `row`, as the model is now."""
    path, _, name = row.path.rpartition(".") if row.how == "number" else (row.path, "", "p")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return (module, name) if hasattr(module, name) else None
