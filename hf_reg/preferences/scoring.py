"""Log-probs of whole answers: one forward, and the head at the answers' own positions only."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..losses import CannotFuse, LinearHead, find_head, head_input, recognize, token_log_probs
from ..training.loss_scale import evaluating
from .data import REFERENCE


__all__ = ["AnswerScores", "model_inputs"]

logger = logging.get_logger("transformers.hf_reg")

NOT_FORWARDED = {"chosen_lengths", "completion_mask", "labels", *REFERENCE}
TRIAL = 16  # tokens


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch goes into a model."""
    return {key: value for key, value in batch.items() if key not in NOT_FORWARDED}


class AnswerScores:
    """Log-probs of the answers of a batch under one model, summed over their tokens.

    Where the head is a plain linear map, it meets answer positions only, a chunk of logits at a time, and logits
    (B, T, V) are never formed. Elsewhere the model's own logits are used; a log message says why.

    Args:
        model (`nn.Module`): a causal language model, without the wrappers of distributed training.
        reason (`str`, *optional*): why whole logits are needed anyway.
    """

    def __init__(self, model: nn.Module, reason: str | None = None) -> None:
        self.model, self.reason = model, reason
        self.head: LinearHead | None = None
        self._module: nn.Linear | None = None
        self._said = False
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._fixed = {"use_cache": False} if "use_cache" in signature(inner.forward).parameters else {}

    def in_chunks(self, batch: Mapping[str, torch.Tensor]) -> bool:
        """Whether the head can be applied outside of the model; found out with the first batch."""
        if self.reason is None and self.head is None:
            try:
                self._module = find_head(self.model, trained=True)
                tokens = batch["input_ids"][0, :TRIAL].repeat(2)[None]
                with evaluating(self.model):
                    self.head, _ = recognize(self.model, self._module, tokens)
            except CannotFuse as reason:
                self.reason = str(reason)
        if self.reason is not None and not self._said:
            self._said = True
            logger.warning(
                f"Log-probs of {type(self.model).__name__} are computed from whole logits, not in chunks: "
                f"{self.reason}."
            )
        return self.reason is None

    def __call__(
        self, batch: Mapping[str, torch.Tensor], model: nn.Module | None = None, whole: bool = False
    ) -> tuple[torch.Tensor, Any]:
        """Sums of log-probs, chosen answers first, with their gradient; and the outputs, if their logits are whole.

        Args:
            batch (mapping): of [`PreferenceCollator`].
            model (`nn.Module`, *optional*): with its wrappers, whose hooks run; by default the model itself.
            whole (`bool`, *optional*, defaults to `False`): ask for whole logits.

        Returns:
            `(torch.Tensor of shape (2 B,), ModelOutput or None)`: sums in fp32 at least.
        """
        model = self.model if model is None else model
        mask = batch["completion_mask"][:, 1:].bool()
        tokens = batch["input_ids"][:, 1:][mask]
        arguments = {**self._fixed, **model_inputs(batch)}
        before = slice(-mask.shape[1] - 1, -1)  # what predicts; prompt tuning puts positions in front
        outputs: Any = None
        if whole or not self.in_chunks(batch):
            outputs = model(**arguments)
            logits = outputs.logits[:, before][mask]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            values = torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]
        else:
            assert self.head is not None and self._module is not None
            with head_input(self._module) as found:
                model(**arguments)
            hidden = found.take()[:, before][mask]
            values = token_log_probs(hidden, tokens, self.head.to(found.dtype))
        sums = values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1)
        return sums, outputs
