"""Which positions of the logits count, and the base of every penalty that looks at logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from hf_reg.base import Penalty


__all__ = ["LogitsPenalty", "answer_mask", "shifts_labels"]

IGNORED = -100


def shifts_labels(model: nn.Module) -> bool:
    """Whether the task loss of `model` compares the logits at t with the label at t + 1.

    Read off the model, unwrapped from PEFT: False for an encoder-decoder, which shifts its decoder inputs instead;
    True for a decoder-only `*ForConditionalGeneration` (vision-language models); for `*CausalLM*` and `*LMHead*`, True
    unless it is a class of transformers that does not call `self.loss_function`: those compare position by position
    (`BartForCausalLM` and its relatives, XLNet, XLM). False for everything else.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    config: Any = getattr(model, "config", None)
    name = type(model).__name__
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        return False
    if "ForConditionalGeneration" in name:
        return True
    if "CausalLM" not in name and "LMHead" not in name:
        return getattr(model, "loss_type", None) == "ForCausalLM"
    own = type(model).__module__.startswith("transformers.")
    return not own or "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names


def answer_mask(
    model: nn.Module, inputs: Mapping[str, Any], logits: torch.Tensor, shift: bool | None = None
) -> torch.Tensor | None:
    """The positions of `logits` that the task loss looks at, (B, T) bool; None (all rows) for (N, D) logits.

    From `inputs["labels"]` (`!= -100`) if it is there, else from the mask of the tokens (`decoder_attention_mask` of
    an encoder-decoder, otherwise `attention_mask`), else every position. With `shift`, the position t counts if the
    token at t + 1 does, and the last one never: it predicts nothing. (BA-LoRA's code selects position t by label t,
    which drops the first answer token and adds the position after the end.)

    Args:
        model (`nn.Module`): decides `shift`, see [`shifts_labels`].
        inputs (mapping of `str` to `torch.Tensor`): the batch.
        logits (`torch.Tensor` of shape `(N, D)` or `(B, T, V)`): of that batch.
        shift (`bool`, *optional*): overrides what `model` says.

    Raises:
        `ValueError`: for logits of another rank and for labels that do not fit them.
    """
    if logits.dim() == 2:
        return None
    if logits.dim() != 3:
        raise ValueError(f"logits {tuple(logits.shape)}: expected (N, D) of examples or (B, T, V) of tokens.")
    shift = shifts_labels(model) if shift is None else shift
    labels = inputs.get("labels")
    if labels is not None:
        source, counts = "labels", labels != IGNORED
        known = torch.ones_like(counts)
    else:
        config = getattr(model, "config", None)
        source = "decoder_attention_mask" if getattr(config, "is_encoder_decoder", False) else "attention_mask"
        attended = inputs.get(source)
        whole = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        counts = known = whole if attended is None or attended.dim() != 2 else attended.bool()
    if counts.shape != logits.shape[:2]:
        raise ValueError(
            f"{source} {tuple(counts.shape)} do not fit logits {tuple(logits.shape)}: expected "
            f"{tuple(logits.shape[:2])}. Penalties on tokens need one label (-100 = ignored) or mask entry a position."
        )
    if shift:
        counts = functional.pad(counts[:, 1:], (0, 1), value=False) & known
    return counts.to(logits.device)


@dataclass(eq=False)
class LogitsPenalty(Penalty):
    """Base of the penalties on logits: of examples, (N, D), or of the tokens that the task loss looks at, (B, T, V).

    Args:
        shift (`bool`, *optional*):
            Whether the logits at t belong to the label at t + 1. `None`: as in the task loss of the model, see
            [`shifts_labels`].
        weight, schedule, name: see [`~hf_reg.base.Penalty`].
    """

    NEEDS: ClassVar[frozenset[str]] = frozenset({"logits"})

    shift: bool | None = field(default=None, kw_only=True)

    def find_logits(self, outputs: Any, *path: str) -> torch.Tensor:
        """`outputs.logits`, or with `path=("teacher",)` those of `outputs.teacher`.

        Raises:
            `ValueError`: if there are none.
        """
        where = ".".join(("outputs", *path, "logits"))
        for part in path:
            outputs = getattr(outputs, part, None)
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                f"{self.name}: {where} is missing. It needs a model head that returns logits (a fused cross-entropy "
                f"does not)" + (f" and a trainer that adds outputs.{path[0]}." if path else ".")
            )
        return logits

    def mask(self, model: nn.Module, inputs: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor | None:
        """[`answer_mask`] with this penalty's `shift`."""
        return answer_mask(model, inputs, logits, self.shift)
