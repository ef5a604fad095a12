"""The numerical core of [`hf_reg.adapters.svd`]: singular triplets of a tall fp32 matrix (long, short)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_reg.penalties.precision import exactly


__all__ = ["full_precision", "krylov", "ritz", "spectrum"]

PADDING = 16  # vectors kept beyond the rank while refining: the gap behind the last one decides the accuracy
STEPS = 40  # of block Krylov, at most


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


def _added(block: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal columns spanning what `block` adds to `basis`, and the coefficients of `block` in both."""
    inside = basis.mT @ block
    new, outside = torch.linalg.qr(block - basis @ inside)
    again = basis.mT @ new  # twice is enough: after one pass rounding has left a little of the basis
    new, outside_again = torch.linalg.qr(new - basis @ again)
    return new, torch.cat([inside + again @ outside, outside_again @ outside])


def krylov(matrix: torch.Tensor, rank: int, tolerance: float, seed: int) -> torch.Tensor | None:
    """An orthonormal basis (short, rank) of the principal right subspace, or None if it does not converge in time.

    Block Golub-Kahan bidiagonalisation with full reorthogonalisation (Musco and Musco 2015, arXiv 1504.05477, which
    proves what blocks of Krylov vectors gain over power iteration). Each step doubles as an error estimate: the
    low-rank matrix changed by c_k, so by the geometric series what is left is about c_k q / (1 - q), q = c_k / c_k-1.
    """
    long, short = matrix.shape
    block = rank // 2 + 8
    steps = min(STEPS, short // 2 // block)
    left, right = matrix.new_empty(long, steps * block), matrix.new_empty(short, (steps + 1) * block)
    core = matrix.new_zeros(steps * block, steps * block)  # left^T matrix right
    start = torch.randn(long, block, generator=torch.Generator().manual_seed(seed)).to(matrix.device)
    right[:, :block] = torch.linalg.qr(matrix.mT @ start).Q
    before: torch.Tensor | None = None
    change = float("inf")
    for step in range(steps):
        low, high = step * block, (step + 1) * block
        left[:, low:high], core[:high, low:high] = _added(matrix @ right[:, low:high], left[:, :low])
        if high >= rank and (step < 8 or step % 2):  # the SVD of a large core costs as much as a step
            u, values, vh = torch.linalg.svd(core[:high, :high])
            product = (u[:, :rank] * values[:rank]) @ vh[:rank]
            if before is not None:
                norm = torch.linalg.vector_norm(values[:rank])
                difference = product.clone()
                difference[: before.shape[0], : before.shape[0]] -= before
                last, change = change, float(torch.linalg.vector_norm(difference) / norm) if norm > 0 else 0.0
                geometric = change < last < float("inf") and change * change / (last - change) <= tolerance
                if geometric or change <= tolerance / 100:
                    return right[:, :high] @ vh[:rank].mT
            before = product
        right[:, high : high + block], _ = _added(matrix.mT @ left[:, low:high], right[:, :high])
    return None


def ritz(matrix: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular triplets of `matrix` (long, short) within the span of `basis` (short, q), which is made orthonormal
    first."""
    basis = torch.linalg.qr(basis).Q
    left, triangle = torch.linalg.qr(matrix @ basis)
    u, values, vh = torch.linalg.svd(triangle)
    return left @ u, values, vh @ basis.mT


def spectrum(matrix: torch.Tensor, rank: int, tolerance: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All triplets from the eigenvectors of the Gram matrix, refined once; from the SVD if that is not exact enough.

    The Gram matrix squares the spectrum, so fp32 loses its small end. One step of subspace iteration and a
    Rayleigh-Ritz projection give it back wherever the residual says so (Davis-Kahan: residual over gap).
    """
    short = matrix.shape[1]
    width = min(short, rank + PADDING)
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    basis = torch.linalg.qr(matrix @ vectors[:, short - width :]).Q
    left, values, right = ritz(matrix, matrix.mT @ basis)
    if width < short:
        top, square = values[:rank], values[:rank].square()
        residual = torch.linalg.vector_norm(matrix.mT @ left[:, :rank] - right[:rank].mT * top, dim=0)
        gap = (square - squares[short - width - 1]).clamp_min(torch.finfo(matrix.dtype).tiny)
        error = torch.minimum(residual * square / gap, top)
        if torch.linalg.vector_norm(error) <= tolerance * torch.linalg.vector_norm(top):
            return left, values, right
    return torch.linalg.svd(matrix, full_matrices=False)
