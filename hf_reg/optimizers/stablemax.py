"""StableMax cross-entropy (arXiv 2501.04697): probabilities that grow linearly, not exponentially, with the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..base import check_choice
from ..penalties.answers import IGNORED, shifts_labels


__all__ = ["StableMaxLoss", "stablemax_log_probs"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def stablemax_log_probs(logits: torch.Tensor) -> torch.Tensor:
    """log(s(z) / sum s(z)) over the last dimension, s(z) = z + 1 for z >= 0 and 1 / (1 - z) for z < 0.

    Computed as log-softmax of log s(z), which is +-log(1 + |z|): nothing can overflow or vanish, so that fp32 gives
    what the authors compute in fp64. These are the probabilities of a head trained with [`StableMaxLoss`]; the most
    likely class is that of softmax.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`).

    Returns:
        `torch.Tensor` of the same shape, in fp32 at least.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # two branches instead of sign(z) log1p(|z|), whose gradient at 0, where a head of zeros starts, would be 0
    logs = torch.where(z >= 0, z.clamp(min=0).log1p(), -(-z).clamp(min=0).log1p())
    return logs.log_softmax(-1)


class StableMaxLoss:
    """Cross-entropy with StableMax in place of softmax, for heads that are trained from scratch.

    From *Grokking at the Edge of Numerical Stability* (arXiv 2501.04697): the gradient does not vanish in rounding
    when the training data are fitted. It is a task loss, given as `compute_loss_func` to a [`~transformers.Trainer`]
    or a [`~hf_reg.RegularizedTrainer`]: the sum over the labels that count, divided by `num_items_in_batch`, so that a
    step is that of its whole batch under accumulation and processes.

    StableMax is not shift-invariant: logits that differ by a constant give other probabilities, so a head that learned
    under softmax means something else under it. A pretrained language-model head is therefore refused rather than
    warned about: the loss would fall all the same, by unlearning that head. Evaluation that needs probabilities, and
    sampling, must use [`stablemax_log_probs`]; arg max needs not.

    Args:
        model (`nn.Module`): to be trained; says whether labels are shifted (causal language models).
        dtype (`str`, *optional*, defaults to `"float32"`): `"float64"` is that of the authors' code; see
            [`stablemax_log_probs`] for why fp32 suffices.
        from_scratch (`bool`, *optional*):
            Whether the head has never seen softmax. By default, not for a language model that was loaded from a
            checkpoint; say True for one that was trained with StableMax, or whose head is new.

    Raises:
        `ValueError`: for a pretrained language-model head.

    Example:

    ```python
    trainer = RegularizedTrainer(model, args, compute_loss_func=StableMaxLoss(model), train_dataset=train)
    ```
    """

    def __init__(self, model: nn.Module, *, dtype: str = "float32", from_scratch: bool | None = None) -> None:
        check_choice("StableMaxLoss", "dtype", dtype, tuple(DTYPES))
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        loaded = bool(getattr(getattr(base, "config", None), "_name_or_path", ""))
        if from_scratch is None:
            from_scratch = head is None or not loaded
        if not from_scratch:
            raise ValueError(
                f"StableMaxLoss: {type(base).__name__} was loaded with a language-model head from "
                f"{base.config._name_or_path!r}. It learned under softmax, which StableMax cannot take the place of. "
                "Train with the usual loss, or say from_scratch=True if the head is new or was trained with StableMax."
            )
        self.shift, self.dtype = shifts_labels(model), DTYPES[dtype]

    def __call__(
        self, outputs: Any, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of a micro-batch.

        Args:
            outputs ([`~transformers.utils.ModelOutput`] or `tuple`): `logits` of shape `(N, C)` or `(B, T, V)`.
            labels (`torch.LongTensor` of shape `(N,)` or `(B, T)`): classes; -100 is ignored.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): labels of the whole step; None gives the mean.

        Returns:
            `torch.Tensor` of shape `()`.

        Raises:
            `ValueError`: for labels that are missing, of another shape, or not classes.
        """
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if labels is None:
            raise ValueError("StableMaxLoss: the batch has no labels. Give the data a column 'labels'.")
        if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"StableMaxLoss: labels {tuple(labels.shape)} ({labels.dtype}) for logits {tuple(logits.shape)}: "
                f"expected classes of shape {tuple(logits.shape[:-1])}."
            )
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        labels = labels.flatten().to(logits.device)
        logs = stablemax_log_probs(logits.flatten(0, -2).to(self.dtype))
        total = functional.nll_loss(logs, labels, ignore_index=IGNORED, reduction="sum")
        items: Any = labels.ne(IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return (total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)).float()
