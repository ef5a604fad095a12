"""Rows of logits: which ones count, their log-probabilities, and the mean over them."""

from __future__ import annotations

import torch

from .precision import widen


__all__ = ["LOWEST", "log_probabilities", "mean_entropy", "mean_over_rows", "rows"]

LOWEST = -1e30  # stands for log(0): 0 * LOWEST is 0, 0 * -inf is not


def rows(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The rows of `logits` that count, (M, V), in fp32 at least.

    Args:
        logits (`torch.Tensor` of shape `(N, D)` or `(B, T, V)`): of examples or of tokens.
        mask (`torch.BoolTensor` of shape `(N,)` or `(B, T)`, *optional*): True = counts. Default: all of them.

    Raises:
        `ValueError`: for other shapes. `TypeError`: for a mask that is not bool.
    """
    if logits.dim() not in (2, 3) or not logits.is_floating_point():
        raise ValueError(f"logits {tuple(logits.shape)} ({logits.dtype}): expected float (N, D) or (B, T, V).")
    if mask is None:
        return widen(logits.flatten(0, -2))
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}: expected torch.bool, True where a row counts; pass mask.bool().")
    if mask.shape != logits.shape[:-1]:
        raise ValueError(
            f"mask {tuple(mask.shape)} does not fit logits {tuple(logits.shape)}: expected "
            f"{tuple(logits.shape[:-1])}, one entry a row."
        )
    return widen(logits[mask.to(logits.device)])


def log_probabilities(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / temperature), finite where a logit is -inf."""
    return torch.log_softmax(logits / temperature, dim=-1).clamp(min=LOWEST)


def mean_over_rows(values: torch.Tensor) -> torch.Tensor:
    """Mean of (M,), and 0 with gradient 0 where M is 0."""
    return values.sum() / max(values.shape[0], 1)


def mean_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Mean over the rows of the entropy of their softmax, in nats."""
    log_p = log_probabilities(logits)
    return -mean_over_rows((log_p.exp() * log_p).sum(-1))
