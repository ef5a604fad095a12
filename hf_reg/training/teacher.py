"""Outputs that penalties compare with: of the pretrained model, and of a second pass with other random masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .loss_scale import evaluating


__all__ = ["Teacher"]


class Teacher:
    """The pretrained model, always in eval mode and without gradients: a model of its own, or the trained `PeftModel`
    with its adapter off, which costs no second copy.

    Args:
        model (`nn.Module`): the model in training, unwrapped.
        other (`nn.Module`, *optional*): a teacher of its own; it is never trained.

    Raises:
        `ValueError`: if there is no other and `model` has no adapter to switch off.
    """

    def __init__(self, model: nn.Module, other: nn.Module | None = None) -> None:
        if other is None and not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"A penalty compares with a teacher, but {type(model).__name__} has no adapter that could be switched "
                "off. Wrap it with PEFT, or pass teacher=AutoModel...from_pretrained(...)."
            )
        if other is model:
            raise ValueError("The teacher is the model in training itself; load a second one, or train an adapter.")
        self.model, self.other = model, other
        if other is not None:
            other.requires_grad_(False).eval()

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """The teacher's outputs for a batch; labels are left out, since its loss is of no use."""
        inputs = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
        if self.other is not None:
            device = next(self.other.parameters()).device
            wanted = next((v.device for v in inputs.values() if isinstance(v, torch.Tensor)), device)
            if device != wanted:
                self.other.to(wanted)
            with evaluating(self.other):
                return self.other(**inputs)
        with self.model.disable_adapter(), evaluating(self.model):  # type: ignore[operator]
            return self.model(**inputs)
