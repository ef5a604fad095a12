"""The orthogonal gradient (arXiv 2501.04697): no weight grows along itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from ..base import check_choice
from ..penalties.precision import widen
from .companion import Companion, local


__all__ = ["PerpGrad", "perpendicular_"]

EPSILON = 1e-30  # of the authors' code
NOISE = 1e-5  # what is left of a parallel gradient in fp32, relative to it


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a, b> in fp32 at least, in pieces: a CPU's dot of 10M fp32 numbers at once is wrong in the fourth digit."""
    size = 1 << (16 if a.device.type == "cpu" else 28)
    pieces = zip(a.reshape(-1).split(size), b.reshape(-1).split(size), strict=True)
    return torch.stack([torch.dot(widen(x), widen(y).to(widen(x).dtype)) for x, y in pieces]).sum()


def _inner_products(left: Sequence[Any], right: Sequence[Any]) -> list[torch.Tensor]:
    """<a, b> of each pair, over all of their shards: one reduction for all that are sharded alike."""
    groups: dict[Any, list[int]] = {}
    for i, a in enumerate(left):
        key = (a.device_mesh, a.placements) if hasattr(a, "placements") else a.device
        groups.setdefault(key, []).append(i)
    found: dict[int, torch.Tensor] = {}
    for key, members in groups.items():
        products = torch.stack([_dot(local(left[i]), local(right[i])) for i in members])
        if isinstance(key, tuple):
            from torch.distributed.tensor import DTensor, Partial

            mesh, placements = key
            parts = [one if one.is_replicate() else Partial() for one in placements]
            products = DTensor.from_local(products, mesh, parts, run_check=False).full_tensor()
        found |= dict(zip(members, products.unbind(), strict=True))
    return [found[i] for i in range(len(left))]


@torch.no_grad()
def perpendicular_(parameters: Iterable[torch.Tensor]) -> None:
    """Replace each gradient g by its part orthogonal to the weight w, scaled to the norm of g, in place.

    g <- g - (<w, g> / (<w, w> + 1e-30)) w, then g <- g * ||g before|| / ||g||, with w and g as vectors. Of sharded
    parameters (DTensor) the products are those of the whole tensors. A weight of zeros leaves its gradient as it is.

    Where nothing orthogonal is left but rounding, the gradient becomes 0; the authors' code scales that rounding up
    to the full norm. Parameters with one element, which have nothing orthogonal, keep their gradient.

    Args:
        parameters (iterable of `torch.Tensor`): of any shape; those without a gradient are left out.

    Raises:
        `ValueError`: for a sparse gradient.
    """
    weights = [p for p in parameters if p.grad is not None and p.numel() > 1]
    if any(p.grad.is_sparse for p in weights):  # type: ignore[union-attr]
        raise ValueError("perp_grad: a gradient is sparse. Make its embedding with sparse=False.")
    gradients = [_as_sharded(p.grad, p) for p in weights]
    if not weights:
        return
    count = len(weights)
    products = _inner_products([*weights, *weights, *gradients], [*gradients, *weights, *gradients])
    along, squares, before = products[:count], products[count : 2 * count], products[2 * count :]
    for w, g, wg, ww in zip(weights, gradients, along, squares, strict=True):
        local(g).addcmul_(local(w).to(g.dtype), (wg / (ww + EPSILON)).to(g.dtype), value=-1)
    after = _inner_products(gradients, gradients)
    for p, g, old, new in zip(weights, gradients, before, after, strict=True):
        local(g).mul_(torch.where(new > NOISE**2 * old, (old / new).sqrt(), 0.0))
        p.grad = g


def _as_sharded(gradient: Any, parameter: Any) -> Any:
    placements = getattr(parameter, "placements", None)
    if placements is None or gradient.placements == placements:
        return gradient
    return gradient.redistribute(parameter.device_mesh, placements)


@dataclass(eq=False)
class PerpGrad(Companion):
    """Every gradient is made orthogonal to its weight, at its old norm, before the optimizer sees it.

    From *Grokking at the Edge of Numerical Stability* (arXiv 2501.04697): without the part along the weights, a model
    that fits its data cannot lower the loss by scaling its logits up. See [`perpendicular_`]. The optimizer's
    momentum is over these gradients, and its decoupled weight decay still shrinks the weights. Norms do not change,
    so that clipping before (as `Trainer` does) and after are the same. LoRA's factors are taken one by one: their
    product is not what the gradient is orthogonal to, and B, which starts at 0, is left alone in the first step.

    Args:
        parameters (`str`, *optional*, defaults to `"all"`):
            `"all"`, as in the authors' code, biases and norms included, or `"matrices"` (two dimensions or more).
    """

    NAME: ClassVar[str] = "perp_grad"
    FORMULA: ClassVar[str] = (
        "g <- g' ||g|| / ||g'||, g' = g - (<w, g> / <w, w>) w, for each weight w and its gradient g"
    )

    parameters: str = "all"

    def __post_init__(self) -> None:
        check_choice(self.NAME, "parameters", self.parameters, ("all", "matrices"))

    def before_step(self, optimizer: Optimizer) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        perpendicular_(p for p in held if self.parameters == "all" or p.dim() > 1)
