"""SORSA's regularizer (arXiv 2409.00055): the factors of an adapter stay orthonormal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hf_reg.base import Penalty, check_choice
from hf_reg.distributed import named_whole_parameters

from .precision import exactly, widen


__all__ = ["Orthonormality", "orthonormality", "slope"]


def _error(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E = M M^T - I over the short side, and its Frobenius norm."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    error = short @ short.mT
    error.diagonal().sub_(1)
    return error, torch.linalg.vector_norm(error)


def _gradient(matrix: torch.Tensor, error: torch.Tensor, norm: torch.Tensor, squared: bool) -> torch.Tensor:
    error = error * (4.0 if squared else torch.where(norm > 0, 2 / norm, 0.0))
    return error @ matrix if matrix.shape[0] <= matrix.shape[1] else matrix @ error


class _Distance(torch.autograd.Function):
    """||M M^T - I||_F or its square, with the gradients 2 E M / ||E||_F and 4 E M, E = M M^T - I."""

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor, squared: bool) -> torch.Tensor:
        with exactly(matrix):
            error, norm = _error(widen(matrix))
        ctx.save_for_backward(matrix, error, norm)
        ctx.squared = squared
        return norm.square() if squared else norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        matrix, error, norm = ctx.saved_tensors
        with exactly(matrix):
            return (_gradient(widen(matrix), error, norm, ctx.squared) * grad).to(matrix.dtype), None


def slope(matrix: torch.Tensor, *, squared: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[`orthonormality`] of a matrix and its gradient, of the shape and dtype of `matrix`, without autograd."""
    with torch.no_grad(), exactly(matrix):
        wide = widen(matrix)
        error, norm = _error(wide)
        gradient = _gradient(wide, error, norm, squared).to(matrix.dtype)
    return norm.square() if squared else norm, gradient


def orthonormality(matrix: torch.Tensor, *, squared: bool = False) -> torch.Tensor:
    """||M M^T - I||_F over the short side (L_reg of SORSA, arXiv 2409.00055): how far the rows are from orthonormal.

    The gradient of the unsquared form has norm 2 however near M is to orthonormal, rounding noise included; at exactly
    0 it is 0 here. Computed in closed form, once differentiable, in fp32 for half-precision input.

    Args:
        matrix (`torch.Tensor` of shape `(r, n)` or `(n, r)`): its shorter side, `r`, is the one compared with I.
        squared (`bool`, *optional*, defaults to `False`): the squared norm; unsquared is the paper's.

    Returns:
        `torch.Tensor` of shape `()`.

    Raises:
        `ValueError`: unless `matrix` has two dimensions.
    """
    if matrix.dim() != 2:
        raise ValueError(f"matrix {tuple(matrix.shape)}: expected two dimensions; reshape or pick the matrix.")
    return _Distance.apply(matrix, squared)


@dataclass(eq=False)
class Orthonormality(Penalty):
    """Orthonormality of every matrix in scope: SORSA's L_reg = ||U^T U - I||_F + ||V^T V - I||_F over all layers.

    From *SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of LLMs* (arXiv 2409.00055).
    Published strength for Llama-2-7B: gamma / learning rate = 4e-4 / 3e-5 = 13.3 (with `reduction="mean"`, as in the
    authors' trainer, which divides it by the accumulation steps too: a bug that is not copied).

    Args:
        squared (`bool`, *optional*, defaults to `False`): see [`orthonormality`]; the paper's form is unsquared.
        reduction (`str`, *optional*, defaults to `"sum"`): `"sum"` over the matrices (paper) or `"mean"` (code).
        weight, schedule, scope, name: see [`~hf_reg.base.Penalty`]. Parameters that are no matrix are left out.
    """

    NAME: ClassVar[str] = "orthonormality"
    FORMULA: ClassVar[str] = "sum over matrices of ||M M^T - I||_F"
    ON_PARAMETERS: ClassVar[bool] = True
    REDUCTION: ClassVar[tuple[str, ...]] = ("sum", "mean")

    squared: bool = False
    reduction: str = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "reduction", self.reduction, self.REDUCTION)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        terms = [
            orthonormality(weight, squared=self.squared)
            for _, weight in named_whole_parameters(model, self.scope)
            if weight.dim() == 2
        ]
        if not terms:
            raise ValueError(
                f"{self.name}: no parameter in scope {self.scope!r} is a matrix; give patterns of 2-D weights such as "
                "'*.lora_A.*'."
            )
        total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
        return total / len(terms) if self.reduction == "mean" else total
