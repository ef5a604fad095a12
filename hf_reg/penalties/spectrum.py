"""BA-LoRA's third term (arXiv 2408.04556 v6): the share of the largest singular values of the logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hf_reg.base import check_choice

from .answers import LogitsPenalty
from .precision import exactly, widen
from .rows import rows


__all__ = ["SvdConcentration", "concentration_of_factor", "starting_block", "svd_concentration"]

NORMS = ("nuclear", "frobenius")
WIDE = 8  # from this many columns a row, the Gram matrix is cheaper than the SVD
EXACT = 256  # up to this many rows every singular value is computed
OVERSAMPLING, ITERATIONS = 5, 2  # of the randomized SVD: q = k + 5, niter = 2, as in the authors' code


def starting_block(width: int, k: int, like: torch.Tensor) -> torch.Tensor:
    """The random (width, k + 5) block of the randomized SVD: always the same, and no random number of training."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(width, k + OVERSAMPLING, generator=generator, dtype=like.dtype, device=like.device)


def _left_singular(
    matrix: torch.Tensor, first: torch.Tensor | None, gram: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left singular vectors and singular values of a wide `matrix`, largest first, and which of them are not zero.

    All of them, or for Frobenius, where the others do not matter, the first k + 5 by subspace iteration from `first`,
    the product of the matrix and a random block.
    """
    eps = torch.finfo(matrix.dtype).eps
    if first is not None:
        basis = torch.linalg.qr(first).Q
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
        vectors, values, _ = torch.linalg.svd(torch.linalg.qr(matrix.mT @ basis).R.mT)
        vectors = basis @ vectors[:, : len(values)]
    elif gram:
        squares, vectors = torch.linalg.eigh(matrix @ matrix.mT)
        values, vectors = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
        return vectors, values, values > values[0] * (16 * eps) ** 0.5  # the Gram matrix has squared them
    else:
        vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return vectors, values, values > values[0] * matrix.shape[1] * eps


def _frobenius(matrix: torch.Tensor) -> torch.Tensor:
    """Row by row: summed at once in fp32, millions of squares lose four digits."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1))


class _Concentration(torch.autograd.Function):
    """- S_k / S with the gradient U c U^T Z + f Z.

    The gradient of a sum of singular values is U V^T over those in the sum, V^T = s^-1 U^T Z, that of the Frobenius
    norm Z / ||Z||. So c = (S_k / S^2 - [i <= k] / S) / s and f = 0 for the nuclear norm, c = - [i <= k] / (S s) and
    f = S_k / S^3 for Frobenius.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, k: int, norm: str, columns: int, start: Callable[[], torch.Tensor] | None
    ) -> torch.Tensor:
        short, long = sorted((len(logits), columns))
        randomized = norm == "frobenius" and short > max(EXACT, k + OVERSAMPLING)
        ctx.tall = len(logits) > (columns if randomized else logits.shape[1])
        matrix = logits.mT if ctx.tall else logits
        with exactly(matrix):
            first = None
            if randomized:
                given = start is not None and not ctx.tall
                first = start() if given else matrix @ starting_block(matrix.shape[1], k, matrix)  # type: ignore[misc]
            vectors, values, present = _left_singular(matrix, first, long >= WIDE * short)
            values = torch.where(present, values, 0.0)
            whole = values.sum() if norm == "nuclear" else _frobenius(matrix)
            inverse = torch.where(whole > 0, 1 / whole, 0.0)
            share = values[:k].sum() * inverse
            weights = torch.zeros_like(values)
            weights[:k] = -inverse
            if norm == "nuclear":
                weights = weights + share * inverse
            weights = torch.where(present, weights / values, 0.0)
            rest = share * inverse * inverse if norm == "frobenius" else torch.zeros_like(share)
        ctx.save_for_backward(matrix, vectors, weights, rest)
        return -share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        matrix, vectors, weights, rest = ctx.saved_tensors
        with exactly(matrix):
            weighted = vectors * (weights * grad)
            if vectors.shape[0] == vectors.shape[1]:  # one pass over the matrix
                core = weighted @ vectors.mT
                core.diagonal().add_(rest * grad)
                slope = core @ matrix
            else:
                slope = weighted @ (vectors.mT @ matrix) + matrix * (rest * grad)
        return slope.mT if ctx.tall else slope, None, None, None, None


def svd_concentration(logits: torch.Tensor, *, k: int, norm: str = "nuclear") -> torch.Tensor:
    """- (sum of the k largest singular values) / norm: L_SVDR of BA-LoRA v6.

    With the nuclear norm (classification) it lies in [-1, 0], with Frobenius (language models) in [-sqrt(k), 0]. The
    gradient is in closed form, once differentiable, and finite for rank-deficient and zero logits; without rows or
    for zero logits the value and the gradient are 0. Exact up to 256 rows (or columns, the fewer); above that the
    Frobenius form uses a randomized SVD (k + 5 vectors, 2 iterations, as in the authors' code; with a seed of its own)
    while the nuclear one stays exact. Matrices with at least 8 times as many columns as rows go through their Gram
    matrix, where singular values below 0.14 % of the largest count as 0 (fp32).

    Args:
        logits (`torch.Tensor` of shape `(N, D)`): rows of logits, not centred.
        k (`int`): how many; 5 for classification, 10 for language models in the paper.
        norm (`str`, *optional*, defaults to `"nuclear"`): `"nuclear"` or `"frobenius"`.

    Raises:
        `ValueError`: for `k < 1`, an unknown `norm`, or unless `logits` has two dimensions.
    """
    check_choice("svd_concentration", "norm", norm, NORMS)
    if k < 1:
        raise ValueError(f"svd_concentration: k={k} is out of range; give k >= 1.")
    if logits.dim() != 2:
        raise ValueError(f"logits {tuple(logits.shape)}: expected (N, D); pass logits[mask] for those of tokens.")
    return concentration_of_factor(widen(logits), k=k, norm=norm, columns=logits.shape[1])


def concentration_of_factor(
    factor: torch.Tensor, *, k: int, norm: str, columns: int, start: Callable[[], torch.Tensor] | None = None
) -> torch.Tensor:
    """[`svd_concentration`] of logits Z from a matrix with the same left singular vectors and values, such as Z.

    Args:
        factor (`torch.Tensor` of shape `(N, d)`): A with A A^T = Z Z^T, fp32 at least.
        k, norm: see [`svd_concentration`].
        columns (`int`): of Z, which decide how it is computed.
        start (callable, *optional*): gives Z times [`starting_block`], where A is not Z.
    """
    if factor.numel() == 0:
        return factor.sum()
    return _Concentration.apply(factor, k, norm, columns, start)


@dataclass(eq=False)
class SvdConcentration(LogitsPenalty):
    """Strengthens the leading singular values of the logits, see [`svd_concentration`].

    Published weights (BA-LoRA v6): 0.005 for language models, 0.03 for classification, with `schedule="two_phase"`;
    [`ba_lora`] sets them. The value depends on the size of the micro-batch, and with the nuclear norm it is constant
    where there are at most k examples or classes: that is warned of once.

    Args:
        k (`int`, *optional*): `None`: 10 for tokens, 5 for examples (paper).
        norm (`str`, *optional*): `None`: `"frobenius"` for tokens, `"nuclear"` for examples (paper).
        shift, weight, schedule, name: see [`LogitsPenalty`].
    """

    NAME: ClassVar[str] = "svd_concentration"
    FORMULA: ClassVar[str] = "- (sum of the k largest singular values of the logits) / their norm"

    k: int | None = None
    norm: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "norm", self.norm, (None, *NORMS))
        if self.k is not None and self.k < 1:
            raise ValueError(f"{self.name}: k={self.k} is out of range; give k >= 1.")
        self._warned = False

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        logits = self.find_logits(outputs)
        tokens = logits.dim() == 3
        k = self.k or (10 if tokens else 5)
        norm = self.norm or ("frobenius" if tokens else "nuclear")
        selected = rows(logits, self.mask(model, inputs, logits))
        if norm == "nuclear" and not self._warned and 0 < min(selected.shape) <= k:
            self._warned = True
            warnings.warn(
                f"{self.name}: the {k} largest of at most {min(selected.shape)} singular values are all of them, so "
                "the term is -1 with gradient 0; use a smaller k, larger micro-batches or norm='frobenius'.",
                stacklevel=2,
            )
        return svd_concentration(selected, k=k, norm=norm)
