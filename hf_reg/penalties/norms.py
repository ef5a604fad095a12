"""L1 and L2 of parameters, as terms of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_reg.base import Penalty, check_choice
from hf_reg.distributed import named_whole_parameters

from .precision import widen


__all__ = ["L1", "L2"]


@dataclass(eq=False)
class _Norm(Penalty):
    ON_PARAMETERS: ClassVar[bool] = True
    REDUCTION: ClassVar[tuple[str, ...]] = ("sum", "mean")

    reduction: str = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "reduction", self.reduction, self.REDUCTION)

    def term(self, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define `term(weight)`.")

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        total, count = None, 0
        for _, weight in named_whole_parameters(model, self.scope):
            term = self.term(widen(weight))
            total = term if total is None else total + term.to(total.device)
            count += weight.numel()
        return total / count if self.reduction == "mean" else total  # type: ignore[operator, return-value]


@dataclass(eq=False)
class L1(_Norm):
    """Sum of the absolute values of the parameters in scope; its subgradient at 0 is 0.

    Args:
        reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"`, the textbook form, or `"mean"` over all elements in scope: the same weight then means the same for
            models of any size.
        weight, schedule, scope, name: see [`~hf_reg.base.Penalty`].
    """

    NAME: ClassVar[str] = "l1"
    FORMULA: ClassVar[str] = "sum |w|"

    def term(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs().sum()


@dataclass(eq=False)
class L2(_Norm):
    """Half the sum of the squares of the parameters in scope: with plain SGD, weight decay of `weight`.

    Under Adam it is scaled with the task gradient, unlike AdamW's decoupled decay.

    Args:
        reduction (`str`, *optional*, defaults to `"sum"`): see [`L1`].
        weight, schedule, scope, name: see [`~hf_reg.base.Penalty`].
    """

    NAME: ClassVar[str] = "l2"
    FORMULA: ClassVar[str] = "1/2 sum w^2"

    def term(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.square().sum() / 2
