"""The numerical core of [`hf_reg.adapters.svd`]: singular triplets of a tall fp32 matrix (long, short)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_reg.penalties.precision import exactly


__all__ = ["full_precision", "krylov", "padded", "ritz", "spectrum"]

PADDING = 8  # vectors kept beyond the rank: the gap behind the last one decides the speed and the accuracy
FIRST = 6  # steps before the first look: measured to be enough where the values fall at all
STEPS = 40  # at most
FP32 = 1e-6  # the least tolerance that a Gram matrix in fp32 can keep


@contextmanager
def full_precision(tensor: torch.Tensor) -> Iterator[None]:
    """fp32 products are fp32: no autocast, no TF32 and no bf16 inside, no gradient."""
    matmuls: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    modern = hasattr(matmuls[0], "fp32_precision")  # torch 2.9; the function before it refuses where this was set

    def use(precisions: Any) -> None:
        if not modern:
            return torch.set_float32_matmul_precision(precisions)
        for each, precision in zip(matmuls, precisions, strict=True):
            each.fp32_precision = precision

    before = [each.fp32_precision for each in matmuls] if modern else torch.get_float32_matmul_precision()
    use(["ieee", "ieee"] if modern else "highest")
    try:
        with torch.no_grad(), exactly(tensor):
            yield
    finally:
        use(before)


def padded(rank: int) -> int:
    """The vectors of a block."""
    return rank + PADDING


def _precision(tolerance: float) -> torch.dtype:
    """Of Gram matrices: they square the spectrum, so that fp32 loses values below 3e-4 of the largest."""
    return torch.float64 if tolerance < FP32 else torch.float32


def _gained(gram: torch.Tensor, squares: torch.Tensor, vectors: torch.Tensor, count: int) -> float:
    """Energy that the eigenvectors of `gram` owe to its last `count` rows and columns, to first order."""
    weights = vectors[-count:]
    return float((squares * weights.square()).sum() - (weights * (gram[-count:, -count:] @ weights)).sum())


def _added(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Rows spanning what `rows` add to those of `basis`, orthonormal; where almost nothing is new, a little shorter:
    they count for less energy than there is, never for more."""
    new = torch.linalg.qr((rows - (rows @ basis.mT) @ basis).mT).Q.mT
    return new - (new @ basis.mT) @ basis  # twice is enough: after one pass rounding has left a little of the basis


def krylov(matrix: torch.Tensor, rank: int, tolerance: float, seed: int) -> torch.Tensor | None:
    """Rows (padded(rank), long) that span the principal left subspace, or None if they do not converge in time.

    Block Krylov steps on A^T A from a random block (Musco and Musco 2015, arXiv 1504.05477, prove what they gain over
    power iteration), until the energy that [`ritz`] will miss is estimated to be within `tolerance` of all energy.
    What the last step gained, and the one before it, is read off the weights of the Ritz vectors in the last two
    blocks, without the cancellation of a difference of sums; what is missing follows by the geometric series through
    the two.
    """
    long, short = matrix.shape
    block, dtype = padded(rank), _precision(tolerance)
    size = min(STEPS, short * 3 // 4 // block) * block
    basis, image = matrix.new_empty(size, short), matrix.new_empty(size, long, dtype=dtype)
    gram = matrix.new_empty(size, size, dtype=dtype)
    allowed = tolerance * float(torch.linalg.vector_norm(matrix)) ** 2
    new = torch.randn(block, long, generator=torch.Generator().manual_seed(seed)).to(matrix.device)
    look = FIRST * block
    for known in range(0, size, block):
        high = known + block
        basis[known:high] = _added(new @ matrix, basis[:known])
        image[known:high] = new = basis[known:high] @ matrix.mT
        gram[known:high, :high] = image[known:high] @ image[:high].mT
        gram[:known, known:high] = gram[known:high, :known].mT
        if high < look:
            continue
        core = gram[:high, :high]
        squares, vectors = torch.linalg.eigh(core)
        last, two = (_gained(core, squares[-rank:], vectors[:, -rank:], count * block) for count in (1, 2))
        ratio = last / (two - last) if 0 < last < two else 1.0
        missing = last * ratio**1.5 / (1 - ratio) if ratio < 1 else math.inf  # 1.5: ritz is half a step more
        if missing <= allowed or two <= allowed / 100:
            return (vectors[:, -block:].mT @ image[:high]).to(matrix.dtype)
        ahead = math.log(allowed / missing) / math.log(ratio) if ratio < 1 else 2
        look = high + min(max(int(ahead), 1), 2) * block
    return None


def spectrum(matrix: torch.Tensor, rank: int, tolerance: float) -> torch.Tensor:
    """Rows like those of [`krylov`] from the whole spectrum: the eigenvectors of the Gram matrix of `matrix`."""
    wide = matrix.mT.to(_precision(tolerance))
    vectors = torch.linalg.eigh(wide @ wide.mT).eigenvectors[:, -padded(rank) :]
    return vectors.mT.to(matrix.dtype) @ matrix.mT


def ritz(matrix: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular triplets of `matrix` (long, short) within the span of `rows` (q, long), which are made orthonormal
    first: half a step more, which also gives back the small values that a Gram matrix loses."""
    left = torch.linalg.qr(rows.mT).Q
    right, triangle = torch.linalg.qr((left.mT @ matrix).mT)
    v, values, uh = torch.linalg.svd(triangle)
    return left @ uh.mT, values, (right @ v).mT
