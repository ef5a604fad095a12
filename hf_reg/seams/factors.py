"""Linear layers as a product of two thin matrices, W = U V^T."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .reparameterized import Reparameterized, Start


__all__ = ["FactorizedLayer", "factorize", "matrix_of"]


class Components(nn.Identity):
    """What the rank of a layer passes through: the place of patches at the seam "rank" (sites/rank.py)."""

    rank_dim = -1


class FactorizedLayer(Reparameterized):
    """Computes x V U^T + bias, and never W.

    `weight_u` is U (out, r) and `weight_v` is V^T (r, in), both trained. What passes between them, x V of shape
    (..., r), goes through the child `components`, where `tensor_dropout` and forward hooks reach the rank dimension.
    """

    PARTS: ClassVar[Mapping[str, type[nn.Module]]] = {"components": Components}

    weight_u: nn.Parameter
    weight_v: nn.Parameter
    components: nn.Module

    @property
    def rank(self) -> int:
        return self.weight_v.shape[0]

    def dense(self) -> torch.Tensor:
        u, v = self.weight_u, self.weight_v
        wide = torch.promote_types(u.dtype, torch.float32)
        with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):
            product = (u.to(wide) @ v.to(wide)).to(u.dtype)
        return product.mT if isinstance(self, Conv1D) else product

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(self.components(F.linear(input, self.weight_v)), self.weight_u, self.bias)


def matrix_of(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """`weight` of `layer` as (out, in)."""
    return weight.mT if isinstance(layer, Conv1D) else weight


def factorize(matrix: torch.Tensor, rank: int) -> Start:
    """Spectral initialisation: U = U_r S_r^(1/2), V = V_r S_r^(1/2) of the principal `rank` singular triplets.

    Args:
        matrix (`torch.Tensor` of shape `(out, in)`): computed in fp32, whatever its dtype.
        rank (`int`): 1 to min(out, in).
    """
    if matrix.is_meta:  # a model without weights, to look at
        shapes = {"weight_u": (matrix.shape[0], rank), "weight_v": (rank, matrix.shape[1])}
        return {name: nn.Parameter(matrix.new_empty(shape)) for name, shape in shapes.items()}
    from ..adapters.svd import decompose  # which imports PEFT

    found = decompose(matrix, rank, tolerance=1e-9)  # the principal subspace itself, not one of almost its energy
    root = found.values.clamp(min=0).sqrt()
    return {
        "weight_u": nn.Parameter((found.left * root).to(matrix.dtype)),
        "weight_v": nn.Parameter((root[:, None] * found.right).to(matrix.dtype)),
    }
