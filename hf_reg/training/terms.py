"""The terms of the loss by name: summed on the device while micro-batches pass, read once when they are logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import nn


__all__ = ["Terms", "gradient_shares"]


def gradient_shares(
    terms: Mapping[str, torch.Tensor], model: nn.Module, accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """Each term's share of the sum of the norms of their gradients; a backward pass for each, and the graph stays.

    Raises:
        `ValueError`: where parameters are sharded.
    """
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
        raise ValueError("gradient_shares=True needs whole gradients: not possible under FSDP or DeepSpeed.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        norms[name] = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    return {name: norm / sum(norms.values()) for name, norm in norms.items()}


class Terms:
    """Running sums of named scalars, and of how much each weighs."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.weights: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self.sums)

    def add(self, name: str, value: torch.Tensor, weight: float = 1.0) -> None:
        value = value.detach().float() * weight
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def merge(self, other: Terms) -> None:
        """Add everything that `other` holds, and empty it."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.weights[name] = self.weights.get(name, 0.0) + other.weights[name]
        other.clear()

    def clear(self) -> None:
        self.sums, self.weights = {}, {}

    def total(self, mean_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The sums, averaged over processes with one reduction, and start again."""
        return self._read(mean_over_processes, None)

    def mean(self, mean_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The weighted means over everything that was added anywhere, and start again."""
        return self._read(mean_over_processes, self.weights)

    def _read(
        self, mean_over_processes: Callable[[torch.Tensor], torch.Tensor], weights: dict[str, float] | None
    ) -> dict[str, float]:
        if not self.sums:
            return {}
        names = sorted(self.sums)
        values = torch.stack([self.sums[name] for name in names])
        if weights is not None:
            values = torch.cat([values, values.new_tensor([weights[name] for name in names])])
        values = mean_over_processes(values)
        if weights is not None:
            values = values[: len(names)] / values[len(names) :]
        self.clear()
        return dict(zip(names, values.tolist(), strict=True))
