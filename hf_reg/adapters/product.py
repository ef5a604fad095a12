"""What an SVD adapter adds to a linear map: its low-rank product less the one that it started from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


__all__ = ["Difference", "Start", "product_factors"]


def _scaled(matrix: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor:
    return matrix if values is None else matrix * values


def product_factors(
    a: torch.Tensor,
    b: torch.Tensor,
    values: torch.Tensor | None,
    a0: torch.Tensor | None,
    b0: torch.Tensor | None,
    values0: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[BS, BS - B_0 S_0] (out, 2r) and [A - A_0; A_0] (2r, in); without A_0 and B_0, BS and A."""
    left = _scaled(b, values)
    if a0 is None or b0 is None:
        return left.to(dtype), a.to(dtype)
    left = torch.cat([left, left - _scaled(b0, values0)], dim=1)
    return left.to(dtype), torch.cat([a - a0, a0]).to(dtype)


class Difference(torch.autograd.Function):
    """result + s (B diag(S) A - B_0 diag(S_0) A_0) x, of which A, S and B are trained.

    It is computed as the one product [BS, BS - B_0 S_0] [A - A_0; A_0], whose factors hold exact zeros at the start,
    so that nothing has to cancel; the gradients of A, S and B are those of rank r. Without A_0, B_0 it is s B S A x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        values: torch.Tensor | None,
        a0: torch.Tensor | None,
        b0: torch.Tensor | None,
        values0: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            left, right = product_factors(a, b, values, a0, b0, values0, dtype)
            rows = x.flatten(0, -2).to(dtype)
            low = rows @ right.mT
            flat = result.flatten(0, -2)
            if flat.dtype == dtype:
                output = torch.addmm(flat, low, left.mT, alpha=scaling)
            else:
                output = flat + (low @ left.mT) * scaling
        ctx.save_for_backward(x, low, a, b, values, a0, b0, values0)
        ctx.scaling, ctx.dtypes = scaling, (result.dtype, x.dtype)
        return output.view(result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, a, b, values, a0, b0, values0 = ctx.saved_tensors
        of_result, of_x, of_a, of_b, of_values, *_ = ctx.needs_input_grad
        rank, dtype = a.shape[0], low.dtype
        into_a = into_b = into_values = into_x = None
        with torch.autocast(grad.device.type, enabled=False):
            left, right = product_factors(a, b, values, a0, b0, values0, dtype)
            flat = grad.flatten(0, -2).to(dtype)
            narrow = flat @ (left if of_x else left[:, :rank])
            narrow *= ctx.scaling
            if of_x:
                into_x = (narrow @ right).view(x.shape).to(ctx.dtypes[1])
            if of_a:
                into_a = (narrow[:, :rank].mT @ x.flatten(0, -2).to(dtype)).to(a.dtype)
            if of_b or of_values:
                low = low if a0 is None else low[:, :rank] + low[:, rank:]
                slope = ((flat.mT @ low) * ctx.scaling).to(b.dtype)
                into_b = _scaled(slope, values)
                into_values = (slope * b).sum(0) if values is not None else None
        into_result = grad.to(ctx.dtypes[0]) if of_result else None
        return into_result, into_x, into_a, into_b, into_values, None, None, None, None


class Start(nn.Module):
    """The product that an adapter started from, frozen: A_0, B_0 and, for SORSA, S_0. In no state dict."""

    a: torch.Tensor
    b: torch.Tensor
    values: torch.Tensor | None

    def __init__(self, a: torch.Tensor, b: torch.Tensor, values: torch.Tensor | None, folded: bool) -> None:
        super().__init__()
        self.folded = folded  # whether the base weight holds the residual, that is, without this product
        for name, tensor in (("a", a), ("b", b), ("values", values)):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def subtracted(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The factors of what `forward` has to subtract."""
        return (None, None, None) if self.folded else (self.a, self.b, self.values)

    def product(self) -> torch.Tensor:
        """(out, in), in fp32 at least."""
        wide = torch.promote_types(self.a.dtype, torch.float32)
        return _scaled(self.b, self.values).to(wide) @ self.a.to(wide)
