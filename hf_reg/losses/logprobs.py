"""Log-probabilities of tokens from what enters the head, a chunk of logits at a time: never (B, T, V)."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..penalties.precision import exactly
from .fused import CHUNK, buffer, parts
from .heads import LinearHead


__all__ = ["token_log_probs"]


def _log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `tokens` (m,) under `logits` (m, V), and the log-sum-exp of each row."""
    normalizer = torch.logsumexp(logits, dim=-1)
    return logits.gather(1, tokens[:, None])[:, 0] - normalizer, normalizer


def _slope(logits: torch.Tensor, tokens: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
    """Gradient of the log-probs of `tokens` at `logits`, in their memory: one-hot - softmax."""
    slope = logits.sub_(normalizer[:, None]).exp_().neg_()
    return slope.scatter_add_(1, tokens[:, None], slope.new_ones(len(tokens), 1))


class _Frozen(torch.autograd.Function):
    """With a frozen head: one pass over the vocabulary, in which each row's gradient is formed too."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, tokens: torch.Tensor, head: LinearHead) -> torch.Tensor:
        out = buffer(len(hidden), head)
        values = out.new_empty(len(hidden))
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for chunk in parts(len(hidden), len(head.weight), hidden.device, CHUNK):
            logits = head.logits(hidden[chunk], out)
            values[chunk], normalizer = _log_probs(logits, tokens[chunk])
            if slopes is not None:
                kept = logits.clone() if head.cap is not None else None
                slopes[chunk] = head.gradient(_slope(logits, tokens[chunk], normalizer), kept)
        ctx.save_for_backward(slopes)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad[:, None].to(slopes.dtype), None, None


class _Trained(torch.autograd.Function):
    """With a head in training, whose gradient needs the upstream one: the chunks are computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: torch.Tensor,
        scale: float,
        cap: float | None,
    ) -> torch.Tensor:
        head = LinearHead(weight, bias, scale, cap)
        out = buffer(len(hidden), head)
        values = out.new_empty(len(hidden))
        normalizers = torch.empty_like(values)
        for chunk in parts(len(hidden), len(weight), hidden.device, CHUNK):
            values[chunk], normalizers[chunk] = _log_probs(head.logits(hidden[chunk], out), tokens[chunk])
        ctx.save_for_backward(hidden, weight, bias, tokens, normalizers)
        ctx.scale, ctx.cap = scale, cap
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, tokens, normalizers = ctx.saved_tensors
        head = LinearHead(weight, bias, ctx.scale, ctx.cap)
        out = buffer(len(hidden), head)
        into_hidden = torch.empty_like(hidden)
        into_weight = torch.zeros(weight.shape, dtype=out.dtype, device=weight.device)
        into_bias = None if bias is None else into_weight.new_zeros(bias.shape)
        with exactly(hidden):
            for chunk in parts(len(hidden), len(weight), hidden.device, CHUNK):
                logits = head.logits(hidden[chunk], out)
                kept = logits.clone() if head.cap is not None else None
                slope = _slope(logits, tokens[chunk], normalizers[chunk]).mul_(grad[chunk, None])
                into_hidden[chunk] = head.gradient(slope, kept)  # leaves the gradient before the cap in slope
                into_weight.addmm_(slope.mT, hidden[chunk].to(slope.dtype), alpha=head.scale)
                if into_bias is not None:
                    into_bias += slope.sum(0) * head.scale
        wide = None if into_bias is None else into_bias.to(bias.dtype)
        return into_hidden, into_weight.to(weight.dtype), wide, None, None, None


def token_log_probs(hidden: torch.Tensor, tokens: torch.Tensor, head: LinearHead) -> torch.Tensor:
    """log softmax(head(hidden))[token] of each row, in fp32 at least, without whole logits.

    One chunk of logits is held at a time. While the head is frozen, the gradient at the hidden states is formed in the
    same pass; a head in training (its weight or bias takes a gradient) costs a second pass over the chunks. Without
    gradients (a reference model) neither is done.

    Args:
        hidden (`torch.Tensor` of shape `(M, d)`): what enters the head at the positions that predict `tokens`.
        tokens (`torch.LongTensor` of shape `(M,)`): in `[0, V)`.
        head ([`LinearHead`]): with the model's own scale and soft cap.

    Returns:
        `torch.Tensor` of shape `(M,)`.

    Raises:
        `ValueError`: for shapes that do not fit, or a token outside of the vocabulary.
    """
    width, depth = head.weight.shape
    if hidden.dim() != 2 or hidden.shape[1] != depth or tokens.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_log_probs: hidden {tuple(hidden.shape)}, tokens {tuple(tokens.shape)}; expected (M, {depth}) and "
            "(M,)."
        )
    on_cpu = tokens.device.type == "cpu"  # elsewhere the question would wait for the device, which asserts it anyway
    if on_cpu and len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < width:
        raise ValueError(
            f"token_log_probs: tokens from {int(tokens.min())} to {int(tokens.max())}; expected 0 to {width - 1}. "
            "Leave out positions without a label (-100) before."
        )
    trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    with exactly(hidden):
        if trained and torch.is_grad_enabled():
            found = _Trained.apply(hidden, head.weight, head.bias, tokens, head.scale, head.cap)
        else:
            found = _Frozen.apply(hidden, tokens, head)
    return found
