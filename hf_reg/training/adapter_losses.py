"""Losses that belong to PEFT's adapters: those that it leaves to the user, and AdaLoRA's, hidden in `forward`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ..base import Penalty
from ..distributed import whole
from ..penalties import orthonormality


__all__ = ["RegularizedConfig", "adapter_losses", "adapters_in_training", "after_optimizer", "muted"]


@runtime_checkable
class RegularizedConfig(Protocol):
    """What the configuration of a regularized adapter tells the trainer."""

    def penalties(self, adapter_name: str, learning_rate: float) -> list[Penalty]: ...

    def after_optimizer(self, model: nn.Module, adapter_name: str, share: float) -> dict[str, torch.Tensor]: ...


def after_optimizer(model: nn.Module, share: float) -> dict[str, torch.Tensor]:
    """What regularized adapters do after a step of the optimizer, and what they measured.

    Args:
        share (`float`): the learning rate of this step over that of the run.
    """
    measured: dict[str, torch.Tensor] = {}
    for name, config in adapters_in_training(model):
        if isinstance(config, RegularizedConfig):
            measured |= config.after_optimizer(model, name, share)
    return measured


class AdapterLoss(Penalty):
    """A loss that a PEFT method defines and leaves to the user to add, such as KaSA's (arXiv 2412.06071)."""

    ON_PARAMETERS = True

    def __init__(self, name: str) -> None:
        super().__init__(name=name)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        return getattr(model.base_model, f"_get_{self.name}_loss")()


class AdaLoraLoss(Penalty):
    """AdaLoRA's orthogonal regularization (arXiv 2303.10512, equation 4), with the weight of its configuration.

    PEFT adds it within `forward`, in evaluation too and multiplied by the accumulation steps; `muted` keeps it out
    there, so that it is scaled as any penalty and `eval_loss` is the task alone.
    """

    ON_PARAMETERS = True

    def __init__(self, config: Any, adapter: str) -> None:
        super().__init__(name="adalora", weight=config.orth_reg_weight)
        self.adapter = adapter

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        factors = [
            whole(parameter).float()
            for name, parameter in model.named_parameters()
            if ("lora_A" in name or "lora_B" in name) and self.adapter in name
        ]
        return torch.stack([orthonormality(factor) for factor in factors]).mean()


def _adalora(model: nn.Module) -> Any:
    """The configuration of the AdaLoRA adapter that is in training, or None."""
    tuner = getattr(model, "base_model", None)
    config = getattr(model, "peft_config", {}).get(getattr(tuner, "trainable_adapter_name", None))
    return config if getattr(config, "orth_reg_weight", 0) > 0 else None


def adapters_in_training(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and configuration of the adapters of a `PeftModel` that are in use and trained."""
    active = getattr(model, "active_adapters", None)
    for name in active if isinstance(active, list) else ():
        config = getattr(model, "peft_config", {}).get(name)
        if config is not None and not config.inference_mode:
            yield name, config


def adapter_losses(model: Any, learning_rate: float, chosen: Sequence[Penalty]) -> list[Penalty]:
    """The losses that the adapters of a `PeftModel` in use define (SORSA, BA-LoRA, KaSA, MonteCLoRA, AdaLoRA) and
    that are not among the `chosen` ones.

    Raises:
        `ValueError`: if two adapters define the same.
    """
    if not hasattr(model, "peft_config"):
        return []
    found: list[Penalty] = []
    for name, config in adapters_in_training(model):
        if isinstance(config, RegularizedConfig):
            found += config.penalties(name, learning_rate)
    names = [penalty.name for penalty in found]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Several active adapters bring the penalty {max(names, key=names.count)!r}: activate one "
            "(model.set_adapter(name)), or give the penalties yourself."
        )
    for name in ("kasa", "monteclora"):
        method = getattr(model.base_model, f"_get_{name}_loss", None)
        if method is not None and isinstance(method(), torch.Tensor):
            found.append(AdapterLoss(name))
    config = _adalora(model)
    if config is not None:
        found.append(AdaLoraLoss(config, model.base_model.trainable_adapter_name))
    known = {penalty.name for penalty in chosen}
    return [penalty for penalty in found if penalty.name not in known]


@contextmanager
def muted(model: nn.Module) -> Iterator[None]:
    """Keep AdaLoRA's loss out of the model's own; PEFT wants a weight above 0, and 1e-30 of it vanishes in any sum."""
    config = _adalora(model)
    if config is None:
        yield
        return
    weight, config.orth_reg_weight = config.orth_reg_weight, 1e-30
    try:
        yield
    finally:
        config.orth_reg_weight = weight
