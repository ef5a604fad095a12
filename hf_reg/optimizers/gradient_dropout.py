"""Gradient dropout regularity (arXiv 2307.15049): task gradients that disagree with the frozen model are dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from ..base import check_range
from .companion import Companion


__all__ = ["GradientDropout", "gradient_dropout"]

EPSILON = 1e-8  # of the authors' code


def gradient_dropout(
    task: torch.Tensor, distillation: torch.Tensor, uniform: torch.Tensor, rate: float = 1.0
) -> torch.Tensor:
    """g_task * ((1 - rate) + rate * [P > U]), P = (1 + sign(g_task) (g_task + g_kl) / (|g_task| + |g_kl| + 1e-8)) / 2.

    P is 1 where both gradients agree in sign (up to the 1e-8), and smaller the stronger the other one pulls against.

    Args:
        task (`torch.Tensor`): g_task, of any shape.
        distillation (`torch.Tensor` of the same shape): g_kl, at the same scale: before clipping.
        uniform (`torch.Tensor` of the same shape): U, drawn from [0, 1).
        rate (`float`, *optional*, defaults to 1.0): of the authors' function: what is dropped is dropped entirely.

    Returns:
        `torch.Tensor` of the same shape: what the optimizer is given.
    """
    wide = torch.promote_types(task.dtype, torch.float32)
    a, b = task.to(wide), distillation.to(wide)
    keep = (1 + a.sign() * (a + b) / (a.abs() + b.abs() + EPSILON)) / 2
    return task * ((1 - rate) + rate * (keep > uniform)).to(task.dtype)


@dataclass(eq=False)
class GradientDropout(Companion):
    """Drops elements of the task gradient at random, the more so the more distilling from the frozen starting model
    pulls the other way; the gradient of the distillation itself is never applied.

    From *Regularized Mask Tuning* (arXiv 2307.15049, R-AMT's GDR), there for binary masks on CLIP. See
    [`gradient_dropout`]. A step needs two gradients, that of the loss (penalties included) and that of KL(teacher ||
    student), both of the whole batch: a second backward pass through the same graph and a forward of the teacher for
    each micro-batch, and one more copy of the gradients.

    With [`~hf_reg.RegularizedTrainer`], `companions="gradient_dropout"`; its `teacher`, or the model with its adapter
    off, is the frozen one. A plain `Trainer` computes one gradient only, so it is refused there. In a loop:

    ```python
    dropping.collect(kl, model.parameters())  # for each micro-batch, before its loss.backward()
    loss.backward()
    dropping.apply(model.parameters(), step)  # once a step, before gradients are clipped
    ```

    Masks are drawn from `seed` and the number of the step alone: the same on every process, and in a resumed run.

    Args:
        rate (`float`, *optional*, defaults to 1.0): l of the paper, the default of the authors' function; their script
            is given one for each data set.
        temperature (`float`, *optional*, defaults to 1.0): of the distillation; the authors' T.
        seed (`int`, *optional*): of the masks; by default that of the training arguments, and 0 in a loop.
    """

    NAME: ClassVar[str] = "gradient_dropout"
    FORMULA: ClassVar[str] = "g <- g ((1 - rate) + rate [P > U]), P = (1 + sign(g) (g + g_kl) / (|g| + |g_kl|)) / 2"

    rate: float = 1.0
    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_range(self.NAME, "rate", self.rate, 0, 1, closed=True)
        check_range(self.NAME, "temperature", self.temperature, 1e-6, float("inf"))
        self._gradients: dict[torch.Tensor, torch.Tensor] = {}

    def collect(self, loss: torch.Tensor, parameters: Iterable[torch.Tensor]) -> None:
        """Add the gradient of a micro-batch's distillation loss, weighted as its task loss is, and keep the graph.

        Raises:
            `ValueError`: for sharded parameters.
        """
        held = [p for p in parameters if p.requires_grad]
        if any(hasattr(p, "full_tensor") for p in held):
            raise ValueError(f"{self.NAME}: a second gradient of sharded parameters is not possible. Use DDP.")
        for p, g in zip(held, torch.autograd.grad(loss, held, retain_graph=True, allow_unused=True), strict=True):
            if g is not None:
                self._gradients[p] = self._gradients[p].add_(g) if p in self._gradients else g.clone()

    @torch.no_grad()
    def apply(
        self,
        parameters: Iterable[torch.Tensor],
        step: int,
        mean_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        """Drop elements of the gradients of `parameters` in place, and forget what was collected.

        Args:
            parameters (iterable of `torch.Tensor`): in the same order on every process and in every run.
            step (`int`): the number of the optimizer step.
            mean_over_processes (callable, *optional*): averages a gradient, as DDP has averaged those of the task.
            seed (`int`, *optional*): in place of this object's own.
        """
        collected, self._gradients = self._gradients, {}
        stream = f"hf_reg {self.seed or 0 if seed is None else seed} {step}".encode()
        digest = int.from_bytes(hashlib.sha256(stream).digest()[:8], "little") >> 1
        generators: dict[torch.device, torch.Generator] = {}
        for p in parameters:
            if p.grad is None:
                continue
            other = collected.get(p)
            if other is None:
                other = torch.zeros_like(p.grad)
            if mean_over_processes is not None:
                other = mean_over_processes(other)
            if p.device not in generators:
                generators[p.device] = torch.Generator(p.device).manual_seed(digest)
            uniform = torch.rand(p.shape, device=p.device, generator=generators[p.device])
            p.grad.copy_(gradient_dropout(p.grad, other, uniform, self.rate))

    def attach(self, optimizer: Optimizer, model: nn.Module | None = None) -> NoReturn:
        raise ValueError(
            f"{self.NAME} acts before gradients are clipped: call collect(kl, parameters) and apply(parameters, step) "
            "instead of attach."
        )

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        raise ValueError(
            f"{self.NAME} needs two gradients a step, and Trainer computes one. Give it to RegularizedTrainer as "
            "companions=, not as a callback."
        )
