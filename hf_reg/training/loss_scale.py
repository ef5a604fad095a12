"""By what each part of a step's loss is multiplied, so that its gradient is that of the whole batch at once.

A step of `G` micro-batches on `W` data-parallel processes computes `G * W` losses. `Trainer` divides each by `G`
(unless it holds the loss to be "scaled" already) and the processes are averaged. What is exact depends on the loss:

- a model that divides its loss by `num_items_in_batch` (most causal language models) is left to `Trainer`;
- a model that takes the argument and ignores it (nearly every other head) would be multiplied by `G * W` by the plain
  `Trainer` (transformers issue 47688). Here its mean counts by its share of the items of the whole step;
- a penalty is the same for every micro-batch, or a mean over one: the mean over micro-batches is what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


__all__ = ["count_items", "divides_by_items", "evaluating", "item_weight", "loss_of", "penalty_factor"]


def penalty_factor(scaled: bool, accumulation: int, once: bool = False) -> float:
    """What a penalty is multiplied with before it joins the loss of a micro-batch.

    Args:
        scaled (`bool`): whether the task loss is scaled for accumulation already, so that nothing is divided later.
        accumulation (`int`): micro-batches of this optimizer step (fewer in a short last window).
        once (`bool`, *optional*, defaults to `False`): whether it joins one micro-batch only, for all of them.
    """
    if once:
        return 1.0 if scaled else float(accumulation)
    return 1.0 / accumulation if scaled else 1.0


def item_weight(items: Any, total: Any, accumulation: int, processes: int) -> Any:
    """What makes a mean over `items` of the `total` of a step exact when it is then divided by `accumulation` and
    averaged over `processes`. Exactly 1 where all micro-batches have the same number of items."""
    return items * (accumulation * processes) / total


def count_items(inputs: Mapping[str, Any], device: torch.device | str = "cpu") -> torch.Tensor:
    """How many items the mean loss of a micro-batch is over: labels that are not -100, or else examples.

    Returns:
        `torch.Tensor` of shape `()`, float64.
    """
    labels = inputs.get("labels")
    if isinstance(labels, torch.Tensor):
        return labels.ne(-100).sum().to(device, torch.float64)
    sizes = [len(value) for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim()]
    if not sizes:
        raise ValueError(f"A batch without a tensor: {sorted(inputs)}. Its examples cannot be counted.")
    return torch.tensor(float(sizes[0]), dtype=torch.float64, device=device)


def loss_of(outputs: Any) -> torch.Tensor:
    """The loss that a model returned, in a `ModelOutput` or first in a tuple."""
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in, and no random number is drawn."""
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def divides_by_items(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the loss of `model` depends on `num_items_in_batch`: asked of the model itself, with two counts."""
    with evaluating(model):
        one, two = (loss_of(model(**inputs, num_items_in_batch=torch.tensor(n))).mean() for n in (1, 2))
    return not torch.allclose(one, two, rtol=1e-4, atol=0, equal_nan=True)
