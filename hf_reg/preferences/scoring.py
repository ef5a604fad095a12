"""Log-probs of whole answers: one forward, and the head at the answers' own positions only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from ..losses import CannotFuse, LinearHead, find_head, head_input, output_layer, recognize, token_log_probs
from ..messages import say
from ..training.loss_scale import evaluating
from .layouts import Layout, padded
from .sharing import Sharing


__all__ = ["AnswerScores", "Limits"]

TRIAL = 16  # tokens


@dataclass(frozen=True)
class Limits:
    """Why a run cannot have what a model might allow; `None`: it can.

    Args:
        chunks (`str`, *optional*): why the head cannot be applied outside of the model, a chunk at a time.
        positions (`str`, *optional*): why it cannot even be applied to answer positions only.
        sharing (`str`, *optional*): why each answer needs a prompt of its own.
    """

    chunks: str | None = None
    positions: str | None = None
    sharing: str | None = None


class AnswerScores:
    """Log-probs of the answers of a batch under one model, summed over their tokens.

    Where the head is a plain linear map, it meets answer positions only, a chunk of logits at a time. Elsewhere the
    model's own head is handed the answer positions, and where that cannot be, logits (B, T, V) are computed; a log
    message says which and why. Where attention allows it, a prompt goes through the model once for both of its
    answers, see [`Sharing`].

    Args:
        model (`nn.Module`): a causal language model, without the wrappers of distributed training.
        limits ([`Limits`], *optional*): what this run rules out.
    """

    def __init__(self, model: nn.Module, limits: Limits | None = None) -> None:
        self.model, self.limits = model, limits or Limits()
        self.sharing = Sharing(model, self.limits.sharing)
        self.head: LinearHead | None = None  # with it, log-probs are computed in chunks
        self._layer: nn.Module | None = None  # without, the model's own, if it can be handed answer positions
        self._ready = False
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._fixed = {"use_cache": False} if "use_cache" in signature(inner.forward).parameters else {}

    def prepare(self, batch: Mapping[str, torch.Tensor], model: nn.Module | None = None) -> None:
        """Find out, with the tokens of a batch, what this model allows; once. On every process alike."""
        if self._ready:
            return
        self._ready = True
        model = self.model if model is None else model
        with evaluating(self.model):
            self._find_head(batch, model)
            self.sharing.settle(batch, lambda trial, layout: self._values(trial, layout, model)[0])

    def _find_head(self, batch: Mapping[str, torch.Tensor], model: nn.Module) -> None:
        name, reason = type(self.model).__name__, self.limits.positions or self.limits.chunks
        if reason is None:
            try:
                head = find_head(self.model, trained=True)
                self.head, _ = recognize(self.model, head, batch["input_ids"][0, :TRIAL].repeat(2)[None])
                self._layer = head
                return
            except CannotFuse as error:
                reason = str(error)
        if self.limits.positions is None:
            try:
                self._try_layer(batch, model)
                say(f"Logits of {name} are computed at all answer positions, not in chunks: {reason}.")
                return
            except CannotFuse as error:
                reason = f"{reason}; {error}"
                self._layer = None
        say(f"Log-probs of {name} are computed from whole logits, not in chunks: {reason}.")

    def _try_layer(self, batch: Mapping[str, torch.Tensor], model: nn.Module) -> None:
        """Raise [`CannotFuse`] unless the model's own head gives the same log-probs at answer positions only."""
        few = {name: tensor[:1] for name, tensor in batch.items()}
        expected, _ = self._values(few, padded(few), model)
        self._layer = output_layer(self.model)
        if self._layer is None:
            raise CannotFuse("it names no head (get_output_embeddings)")
        try:
            found, _ = self._values(few, padded(few), model)
        except (IndexError, RuntimeError, TypeError) as error:
            raise CannotFuse(f"its head takes no single positions ({str(error)[:120]})") from error
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
            raise CannotFuse("its log-probs depend on all positions of the head")

    def _values(
        self, batch: Mapping[str, torch.Tensor], layout: Layout, model: nn.Module, whole: bool = False
    ) -> tuple[torch.Tensor, Any]:
        """Log-probs (M,) of the tokens of answers, row by row of the padded batch; and the outputs, if whole."""
        tokens = batch["input_ids"][:, 1:][batch["completion_mask"][:, 1:].bool()]
        arguments = {**self._fixed, **layout.inputs}
        if self.head is not None and not whole:
            assert isinstance(self._layer, nn.Linear)
            with head_input(self._layer) as kept:
                model(**arguments)
            hidden = layout.answers(kept.take())
            return token_log_probs(hidden, tokens, self.head.to(kept.dtype)), None
        if self._layer is None or whole:
            outputs = model(**arguments)
            return _log_probs(layout.answers(outputs.logits), tokens), outputs
        handle = self._layer.register_forward_pre_hook(lambda _, args: (layout.answers(args[0])[None], *args[1:]))
        try:
            return _log_probs(model(**arguments).logits[0], tokens), None
        finally:
            handle.remove()

    def __call__(
        self, batch: Mapping[str, torch.Tensor], model: nn.Module | None = None, whole: bool = False
    ) -> tuple[torch.Tensor, Any]:
        """Sums of log-probs, chosen answers first, with their gradient; and the outputs, if their logits are whole.

        Args:
            batch (mapping): of [`PreferenceCollator`].
            model (`nn.Module`, *optional*): with its wrappers, whose hooks run; by default the model itself.
            whole (`bool`, *optional*, defaults to `False`): ask for whole logits of the padded rows.

        Returns:
            `(torch.Tensor of shape (2 B,), ModelOutput or None)`: sums in fp32 at least.
        """
        model = self.model if model is None else model
        if not whole:
            self.prepare(batch, model)
        layout = padded(batch) if whole else self.sharing(batch)
        values, outputs = self._values(batch, layout, model, whole)
        mask = batch["completion_mask"][:, 1:].bool()
        return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1), outputs


def _log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of `tokens` (M,) under `logits` (M, V), in fp32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
