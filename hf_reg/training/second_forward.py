"""Outputs that carry a gradient, where the trainer below computes its loss without."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn


__all__ = ["SecondForward"]


class SecondForward:
    """What penalties see. TRL's trainers compute their loss without logits, and outputs that are asked for anyway
    carry no gradient: then the model runs once more, and the trainer below is not asked again."""

    def __init__(self) -> None:
        self.needed = False

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Any:
        """`outputs`, or those of a forward of the unwrapped `model` on the batch without labels."""
        logits = getattr(outputs, "logits", None)
        if self.needed or (logits is not None and not logits.requires_grad and torch.is_grad_enabled()):
            self.needed = True
            base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
            known = signature(base.forward).parameters
            return model(**{k: v for k, v in inputs.items() if k in known and k != "labels"})
        return outputs
