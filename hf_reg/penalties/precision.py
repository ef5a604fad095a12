"""In which precision the penalties compute: fp32 at least, whatever the weights, the logits or autocast say."""

from __future__ import annotations

import torch


__all__ = ["exactly", "widen"]


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in fp32 if it is fp16 or bf16, otherwise as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def exactly(tensor: torch.Tensor) -> torch.autocast:
    """A context without autocast, which would compute Gram matrices in bf16."""
    return torch.autocast(tensor.device.type, enabled=False)
