"""Whether every term of a step is finite, on every process: noted on the device, read once an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator


__all__ = ["FiniteTerms", "not_finite"]


class FiniteTerms:
    """The terms of the micro-batches of a step, and which of them were finite."""

    def __init__(self) -> None:
        self._flags: dict[str, torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._flags)

    def note(self, terms: Mapping[str, torch.Tensor]) -> None:
        for name, term in terms.items():
            finite = term.detach().isfinite()
            self._flags[name] = self._flags[name] & finite if name in self._flags else finite

    def take(self, accelerator: Accelerator) -> list[str]:
        """The names of those that were not, on any process, and start again; one reduction."""
        names = sorted(self._flags)
        bad = accelerator.reduce(torch.stack([~self._flags[name] for name in names]).float(), "sum")
        self._flags = {}
        return [name for name, count in zip(names, bad.tolist(), strict=True) if count]


def not_finite(names: list[str], step: int, folder: str | None) -> FloatingPointError:
    """The error that stops a run."""
    return FloatingPointError(
        f"Step {step}: not finite: the loss term {', '.join(names)}. Training stops; the checkpoints in {folder} are "
        "from before this step. Lower the term's weight or the learning rate, or set on_nonfinite='skip'."
    )
