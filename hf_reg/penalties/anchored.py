"""L2-SP (arXiv 1802.01483): stay near the pretrained weights; and the anchor that it shares with EWC."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn

from hf_reg.base import Penalty, check_range
from hf_reg.distributed import named_whole_parameters

from .precision import widen


__all__ = ["L2SP", "AnchoredPenalty"]


@dataclass(eq=False)
class AnchoredPenalty(Penalty):
    """Base of the penalties on the distance from where training began: `prepare` copies the weights, whole ones.

    `state_dict` and `load_state_dict` keep the anchor across a resume, which starts from weights that have moved.
    """

    ON_PARAMETERS: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.anchors: dict[str, torch.Tensor] = {}

    def anchored(self, name: str) -> bool:
        """Whether the parameter `name` has an anchor."""
        return True

    def prepare(self, model: nn.Module) -> None:
        self.anchors = {
            name: weight.detach().clone(memory_format=torch.contiguous_format)
            for name, weight in named_whole_parameters(model, self.scope)
            if self.anchored(name)
        }

    def distances(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """Name, weight and its distance from the anchor (None where it has none), of every parameter in scope.

        Raises:
            `ValueError`: before `prepare`, or for an anchor that is missing or of another shape.
        """
        if not self.anchors:
            raise ValueError(
                f"{self.name}: there is no anchor yet; call prepare(model) before the first step, or load_state_dict."
            )
        for name, weight in named_whole_parameters(model, self.scope):
            if not self.anchored(name):
                yield name, widen(weight), None
                continue
            anchor = self.anchors.get(name)
            if anchor is None or anchor.shape != weight.shape:
                found = "missing" if anchor is None else f"of shape {tuple(anchor.shape)}"
                raise ValueError(
                    f"{self.name}: the anchor of {name} {tuple(weight.shape)} is {found}; the model or the scope has "
                    "changed since prepare(model)."
                )
            if anchor.device != weight.device:
                anchor = self.anchors[name] = anchor.to(weight.device)
            yield name, widen(weight), widen(weight) - widen(anchor)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs, as plain tensors that safetensors can save."""
        return {f"anchor.{name}": tensor for name, tensor in self.anchors.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state_dict` gave; replaces the anchor of `prepare`."""
        self.anchors = _part(state, "anchor.")
        if not self.anchors:
            raise ValueError(f"{self.name}: the state holds no 'anchor.*' tensor; expected what state_dict() gave.")


def _part(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value.clone() for key, value in state.items() if key.startswith(prefix)}


@dataclass(eq=False)
class L2SP(AnchoredPenalty):
    """L2-SP: alpha / 2 * ||w - w0||^2 over pretrained parameters + beta / 2 * ||w||^2 over new ones.

    From *Explicit Inductive Bias for Transfer Learning with Convolutional Networks* (arXiv 1802.01483). w0 are the
    weights at `prepare`: for a LoRA adapter its initial factors, not zero.

    Args:
        alpha (`float`, *optional*, defaults to 0.1): unverified; the paper chooses it by cross-validation.
        beta (`float`, *optional*, defaults to 0.01): the value the paper fixes (unverified).
        new (`str` or sequence of `str`, *optional*, defaults to `("*classifier*", "*score*", "*qa_outputs*")`):
            Glob patterns of newly initialised parameters; the default, the usual heads of transformers, is our choice.
        weight, schedule, scope, name: see [`~hf_reg.base.Penalty`].
    """

    NAME: ClassVar[str] = "l2_sp"
    FORMULA: ClassVar[str] = "alpha / 2 ||w - w0||^2 + beta / 2 ||w_new||^2"

    alpha: float = 0.1
    beta: float = 0.01
    new: str | Sequence[str] = ("*classifier*", "*score*", "*qa_outputs*")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("alpha", "beta"):
            check_range(self.name, key, getattr(self, key), 0, float("inf"))
        self.patterns = (self.new,) if isinstance(self.new, str) else tuple(self.new)

    def anchored(self, name: str) -> bool:
        return not any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        if not self.anchors:
            raise ValueError(
                f"{self.name}: every parameter in scope {self.scope!r} is new by {self.patterns}; nothing is left to "
                "anchor. Widen `scope`, narrow `new`, or use 'l2'."
            )

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        terms = [
            self.beta / 2 * weight.square().sum() if distance is None else self.alpha / 2 * distance.square().sum()
            for _, weight, distance in self.distances(model)
        ]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()
