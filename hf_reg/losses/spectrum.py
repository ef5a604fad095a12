"""The singular values of all logits at once, without the logits: those of a matrix as narrow as the hidden states."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..penalties.precision import exactly, widen
from ..penalties.spectrum import concentration_of_factor, starting_block
from .heads import CannotFuse, LinearHead


__all__ = ["HeadSpectrum"]

ROWS = 4096  # of the weight, multiplied at once


class HeadSpectrum:
    """[`svd_concentration`] of the logits Z = H W^T of hidden states H, from H R with R R^T = W^T W, (d, d).

    Z and H R have the same left singular vectors and singular values. R is computed once: W is frozen. A bias is one
    more column of W, beside a column of ones in H.

    Args:
        head ([`LinearHead`]): without a cap, which would make the logits no linear map.
    """

    def __init__(self, head: LinearHead) -> None:
        if head.cap is not None:
            raise CannotFuse("the logits are capped, so their singular values cannot be had without them")
        self.head = head
        self._starts: dict[int, torch.Tensor] = {}
        with torch.no_grad(), exactly(head.weight):
            squares = sum((part.mT @ part).double() for part in self._weight_parts())
            assert isinstance(squares, torch.Tensor)
            root, failed = torch.linalg.cholesky_ex(squares)
            if failed or not root.isfinite().all():  # fewer tokens than dimensions
                values, vectors = torch.linalg.eigh(squares)
                root = vectors * values.clamp(min=0).sqrt()
            self.root = root.to(torch.promote_types(head.weight.dtype, torch.float32))

    def _weight_parts(self) -> Iterator[torch.Tensor]:
        """W, and the bias as its last column, some rows at a time; a scale would cancel in the ratio."""
        for start in range(0, len(self.head.weight), ROWS):
            weight = widen(self.head.weight[start : start + ROWS])
            if self.head.bias is not None:
                weight = torch.cat([weight, widen(self.head.bias[start : start + ROWS, None])], dim=1)
            yield weight

    def _start(self, k: int) -> torch.Tensor:
        """W^T times the random block with which the penalty starts on Z, so that both find the same."""
        if k not in self._starts:
            with torch.no_grad(), exactly(self.root):
                block = starting_block(len(self.head.weight), k, self.root)
                pairs = zip(self._weight_parts(), block.split(ROWS), strict=True)
                self._starts[k] = torch.stack([part.mT @ some for part, some in pairs]).sum(0)
        return self._starts[k]

    def __call__(self, hidden: torch.Tensor, *, k: int, norm: str) -> torch.Tensor:
        """`svd_concentration(Z, k=k, norm=norm)` of the logits of `hidden` (M, d), with its gradient."""
        with exactly(hidden):
            wide = widen(hidden)
            if self.head.bias is not None:
                wide = torch.cat([wide, wide.new_ones(len(wide), 1)], dim=1)
            return concentration_of_factor(
                wide @ self.root, k=k, norm=norm, columns=len(self.head.weight), start=lambda: wide @ self._start(k)
            )
