"""What the policy is compared with: the model with its adapter off, a model of its own, or stored log-probs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..messages import say
from ..seams.attention import gates
from ..training.loss_scale import evaluating
from .data import REFERENCE
from .scoring import AnswerScores


__all__ = ["Reference", "refuse_head"]

KEEPS_BASE = (True, False, "gaussian", "eva", "mica")  # init_lora_weights that leave the base weights as they were
REMEDY = (
    "Pass ref_model=AutoModelForCausalLM.from_pretrained(...), or data with ref_chosen_logps and ref_rejected_logps"
)


def refuse_head(model: nn.Module) -> None:
    """Raise `ValueError` if the output embeddings carry an adapter, or are a copy in training beside a frozen one."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise ValueError(
            f"The head of {type(base).__name__} is adapted ({type(head).__name__}), but log-probs are computed in "
            "chunks, with one frozen head for policy and reference. Leave lm_head out of target_modules and "
            "modules_to_save."
        )


def _changed(model: Any) -> Iterator[str]:
    """Why the model with its adapter off is not the model that training starts from."""
    for name, config in model.peft_config.items():
        start = getattr(config, "init_lora_weights", True)
        if start not in KEEPS_BASE:
            yield f"adapter {name!r} was initialised with init_lora_weights={start!r}, which rewrote the base weights"
        if getattr(config, "kasa_config", None) is not None:
            yield f"adapter {name!r} (KaSA) truncated the base weights"
        if getattr(config, "folded", False):
            yield f"adapter {name!r} is folded into the base weights (folded=True)"
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        yield "an adapter is merged into the base weights (call unmerge_adapter, or train before you merge)"
    adapters = set(model.peft_config)
    own = [
        name for name, parameter in model.named_parameters()
        if parameter.requires_grad and not adapters & set(name.split("."))
    ]  # fmt: skip
    if own:
        yield f"{len(own)} parameters of the base model are in training (such as {own[0]})"


def _starts_off(model: nn.Module) -> bool:
    """Whether a plain LoRA adapter changes the model before training."""
    return any(
        bool(parameter.detach().any())
        for module in model.modules()
        if hasattr(module, "lora_B") and not hasattr(module, "lora_start")
        for parameter in module.lora_B.parameters()  # type: ignore[union-attr]
        if parameter.requires_grad
    )


class Reference:
    """Log-probs of the answers under the model that the policy is compared with; `str` says which one.

    A reference that is computed runs in eval mode, without gradients and random numbers: dropout and patches are off.

    Args:
        model (`nn.Module`): the policy, without the wrappers of distributed training.
        other (`nn.Module`, *optional*): a reference of its own; it is never trained.
        stored (`bool`, *optional*, defaults to `False`): whether the data brings the reference's log-probs.
        at_start (`bool`, *optional*, defaults to `False`): whether they are computed before training: then a model
            that is trained as a whole may be its own reference.

    Raises:
        `ValueError`: if there is no reference, more than one, or the base of the adapter was changed.
    """

    def __init__(
        self, model: nn.Module, other: nn.Module | None = None, stored: bool = False, at_start: bool = False
    ) -> None:
        self.model, self.other, self.stored = model, other, stored
        self.kept: str | None = None  # what it was, once its log-probs are in the data
        if other is not None and stored:
            raise ValueError(
                f"Two references: ref_model and the columns {' and '.join(REFERENCE)}. Leave one of them out."
            )
        if other is model:
            raise ValueError("ref_model is the model in training itself. Load a second one, or train an adapter.")
        if other is not None:
            other.requires_grad_(False).eval()
        elif not stored and (self._has_adapter or not at_start):
            self._check_adapter(model)
        self.scores = AnswerScores(model if other is None else other)

    @property
    def _has_adapter(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    def _check_adapter(self, model: Any) -> None:
        if not self._has_adapter:
            raise ValueError(
                f"{type(model).__name__} is trained as a whole, so no reference is left of it. {REMEDY}; or "
                "compute its log-probs before training (precompute_reference=True); or train an adapter "
                "(peft.get_peft_model), which is switched off for the reference."
            )
        changes = "; ".join(_changed(model))
        if changes:
            raise ValueError(
                f"The model with its adapter off is not the model that training starts from: {changes}. {REMEDY}; or "
                "train an adapter that leaves the base alone (LoRA with its default initialisation, SORSA, BA-LoRA)."
            )
        if _starts_off(model):
            say(
                "The adapter is not zero at the start: the reference is the model below it, not the policy that "
                "training starts from. For the latter merge it first (merge_and_unload) and train a new adapter."
            )

    def refuse_patches(self) -> None:
        """Raise `ValueError` if a patch of the policy acts in eval mode, and so in the reference."""
        shared = self.other is None and not self.stored
        names = sorted({gate.patch.name for gate in gates(self.model) if gate.patch.in_eval}) if shared else []
        if names:
            raise ValueError(
                f"{', '.join(names)} acts in eval mode too, so the reference would carry it. {REMEDY}, or leave the "
                "patch out (unpatch_model)."
            )

    def keep(self, note: str) -> None:
        """From now on the data brings the log-probs. Other data can be compared with an adapter that is off only.

        Args:
            note (`str`): how they were computed, for `str`.
        """
        self.kept = f"{self}, computed before training ({note})"
        self.stored = self.other is not None or not self._has_adapter
        if self.other is not None:
            self.other, self.scores = None, AnswerScores(self.model)

    def __str__(self) -> str:
        if self.kept is not None:
            return self.kept
        if self.stored:
            return f"the log-probs stored as {' and '.join(REFERENCE)}"
        if self.other is not None:
            return f"the given {type(self.other).__name__}"
        if not self._has_adapter:
            return f"{type(self.model).__name__} as it is at the start"
        return f"{type(self.model.get_base_model()).__name__} with the adapter off"  # type: ignore[operator]

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sums of log-probs (2 B,), chosen answers first: those in the batch, or else computed.

        Raises:
            `ValueError`: if they are to be in the batch and are not.
        """
        missing = [name for name in REFERENCE if name not in batch]
        if not missing:
            return torch.cat([batch[name] for name in REFERENCE])
        if self.stored and self.kept is None:
            raise ValueError(
                f"The training data brings the reference's log-probs, this batch has no {' and '.join(missing)}. "
                "Give the columns in every data set, or pass ref_model."
            )
        if self.stored:
            raise ValueError(
                f"The reference ({self}) is gone, and this batch has no {' and '.join(missing)}. Give these data as "
                "eval_dataset when the trainer is made, or with the columns; or leave precompute_reference out and "
                "pass ref_model."
            )
        if self.other is not None:
            device = batch["input_ids"].device
            if next(self.other.parameters()).device != device:
                self.other.to(device)
            with evaluating(self.other):
                return self.scores(batch)[0]
        off = self.model.disable_adapter() if self._has_adapter else nullcontext()  # type: ignore[operator]
        with off, evaluating(self.model):
            return self.scores(batch)[0]
