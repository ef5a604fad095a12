"""The loss of a micro-batch without whole logits, where that gives the same as with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from ..base import Penalty
from ..losses import (
    CannotFuse,
    HeadSpectrum,
    LinearHead,
    RowWeights,
    find_head,
    fused_loss,
    head_input,
    recognize,
    top_logits_of,
)
from ..losses.heads import TOLERANCES
from ..penalties import Confidence, Consistency, Diversity, SvdConcentration, TopLogits, answer_mask
from .example_ids import EXAMPLE_IDS
from .loss_scale import evaluating, penalty_factor


if TYPE_CHECKING:
    from ..trainer import RegularizerMixin

__all__ = ["FusedStep"]

logger = logging.get_logger("transformers.hf_reg")

FUSED: dict[type[Penalty], str] = {
    Consistency: "consistency", Diversity: "diversity", Confidence: "confidence", SvdConcentration: "concentration",
}  # fmt: skip
BATCH = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels", EXAMPLE_IDS}
TRIAL = 16  # tokens


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(one, "_orig_mod") or one._compiled_call_impl is not None for one in model.modules())


def _part(penalty: Penalty) -> str:
    """Which term of [`fused_loss`] a penalty is, or the concentration."""
    if isinstance(penalty, Diversity) and penalty.top_k is None:  # the entropy of the whole vocabulary
        return "confidence"
    return FUSED[type(penalty)]


class FusedStep:
    """Decides once, on the first batch, whether the loss of a trainer can be fused, and computes it.

    Args:
        trainer ([`RegularizerMixin`]): that it belongs to.
    """

    def __init__(self, trainer: RegularizerMixin) -> None:
        self.trainer = trainer
        self.forget()

    def forget(self) -> None:
        """Decide anew, for another model."""
        self.head: LinearHead | None = None
        self.spectrum: HeadSpectrum | None = None
        self.reason: str | None = None  # why not; empty: nobody asked for it
        self._module: nn.Linear | None = None

    def applies(self, inputs: Mapping[str, Any], items: Any) -> bool:
        """Whether this micro-batch is computed here. What stands against it is said once."""
        if self.reason is None and self.head is None:
            self.reason = self._decide(inputs, items)
        return self.reason is None

    def _decide(self, inputs: Mapping[str, Any], items: Any) -> str | None:
        wanted = getattr(self.trainer.args, "fused_loss", None)
        if wanted is False or (wanted is None and not any(type(one) in FUSED for one in self.trainer.penalties)):
            return ""
        try:
            self._check_trainer()
            self._check_penalties()
            self._check_model(inputs, items)
        except CannotFuse as reason:
            say = logger.warning if wanted else logger.info
            say(f"The loss is computed from whole logits, not in chunks: {reason}.")
            self.head = None
            return str(reason)
        return None

    def _check_trainer(self) -> None:
        trainer, args = self.trainer, self.trainer.args
        kind = trainer.accelerator.distributed_type.value
        config = getattr(trainer.accelerator, "parallelism_config", None)
        for stands, reason in (
            (not trainer._plain_loss, f"{type(trainer).__name__} stands on a trainer that computes its loss itself"),
            (trainer.label_smoother is not None, "label smoothing looks at whole logits"),
            (trainer.compute_loss_func is not None, "compute_loss_func looks at whole logits"),
            (getattr(args, "gradient_shares", False), "gradient_shares needs a gradient for each term"),
            (trainer._dropping is not None, "gradient dropout needs a second gradient"),
            (args.torch_compile or _is_compiled(trainer.model), "the model is compiled"),
            (args.n_gpu > 1, "torch.nn.DataParallel copies the model"),
            (kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"), f"{kind} may shard the head"),
            (getattr(config, "non_data_parallel_size", 1) > 1, "tensor or context parallelism splits a batch"),
        ):
            if stands:
                raise CannotFuse(reason)

    def _check_penalties(self) -> None:
        found: set[Any] = set()
        for penalty in self.trainer.penalties:
            if penalty.ON_PARAMETERS:
                continue
            if type(penalty) not in FUSED:
                raise CannotFuse(f"the penalty {penalty.name} looks at the outputs of the model")
            if _part(penalty) in found:
                raise CannotFuse(f"the penalty {penalty.name} is the second of its kind")
            if getattr(penalty, "shift", None) is False:
                raise CannotFuse(f"the penalty {penalty.name} has shift=False")
            if getattr(penalty, "form", "kl") != "kl":
                raise CannotFuse(f"the penalty {penalty.name} has form={penalty.form!r}")  # type: ignore[attr-defined]
            found.add(_part(penalty))
        teacher = self.trainer._penalties.teacher
        if teacher is not None and teacher.other is not None:
            raise CannotFuse("the teacher is a model of its own")

    def _check_model(self, inputs: Mapping[str, Any], items: Any) -> None:
        other = sorted(set(inputs) - BATCH)
        ids, labels = inputs.get("input_ids"), inputs.get("labels")
        if other or ids is None or labels is None or ids.shape != labels.shape:
            raise CannotFuse(f"the batch holds {', '.join(sorted(inputs))}; known are {', '.join(sorted(BATCH))}")
        model = self.trainer.bare_model
        head = find_head(model)
        attended = inputs.get("attention_mask")
        tokens = ids[0] if attended is None or attended.dim() != 2 else ids[0][attended[0].bool()]
        tokens = tokens[:TRIAL].repeat(2)[None]  # at least two
        divides = items is not None and self.trainer.model_accepts_loss_kwargs
        count = torch.tensor(3.0, device=ids.device)
        with evaluating(model):
            arguments = {"num_items_in_batch": count} if divides else {}
            self.head, (outputs, hidden, dtype) = recognize(model, head, tokens, **arguments)
            if len(hidden) != tokens.shape[1]:
                raise CannotFuse(f"{type(model).__name__} adds {len(hidden) - tokens.shape[1]} positions of its own")
            weight = 1 / count if divides else count.new_tensor(1 / (tokens.shape[1] - 1))
            loss, _ = fused_loss(hidden[:-1], tokens[0, 1:], self.head.to(dtype), RowWeights(weight))
            if not torch.allclose(loss.float(), outputs.loss.float(), rtol=TOLERANCES[dtype], atol=0):
                raise CannotFuse(
                    f"{type(model).__name__} returns a loss of {outputs.loss:.6g} where the cross-entropy of its "
                    f"logits is {loss:.6g}"
                )
        self._module = head
        if any(type(penalty) is SvdConcentration for penalty in self.trainer.penalties):
            self.spectrum = HeadSpectrum(self.head)
        if divides:
            self.trainer._task.divides = True

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Any], items: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Task and penalties on logits, scaled as their sum for `training_step`.

        Args:
            model (`nn.Module`): with its wrappers, whose hooks run.
            inputs (mapping of `str` to `torch.Tensor`): the micro-batch, with labels and without example ids.
            items (`torch.Tensor` or `int`, *optional*): `num_items_in_batch`.

        Returns:
            `(torch.Tensor, dict)`: the sum, with its gradient, and each term by name, without.
        """
        assert self.head is not None and self._module is not None
        trainer, labels = self.trainer, inputs["labels"]
        strengths: dict[type, tuple[Any, float]] = {
            type(penalty): (penalty, strength)
            for penalty in trainer.penalties
            if type(penalty) in FUSED and (strength := penalty.strength(*trainer._progress))
        }
        forwarded = {key: value for key, value in inputs.items() if key not in ("labels", EXAMPLE_IDS)}
        mask = answer_mask(trainer.bare_model, inputs, labels[..., None])
        assert mask is not None
        teacher = self._teacher(inputs, mask) if Consistency in strengths else None
        with head_input(self._module) as found:
            model(**forwarded)
        hidden, dtype = found.take(), found.dtype
        count = mask.sum()
        hidden = hidden[mask.to(hidden.device)]
        targets = torch.roll(labels, -1, dims=-1)[mask]
        weights, names = self._weights(strengths, inputs, count, len(hidden), items)
        loss, terms = fused_loss(hidden, targets.to(hidden.device), self.head.to(dtype), weights, teacher)
        named = {"task": terms["task"]} | {name: terms[part] for part, name in names.items() if part in terms}
        if SvdConcentration in strengths:
            assert self.spectrum is not None
            penalty, strength = strengths[SvdConcentration]
            factor = strength * penalty_factor(self._scaled(items), trainer.current_gradient_accumulation_steps)
            term = factor * self.spectrum(hidden, k=penalty.k or 10, norm=penalty.norm or "frobenius")
            named[penalty.name], loss = term.detach(), loss + term
        return loss, named

    def _scaled(self, items: Any) -> bool:
        return self.trainer._is_scaled(items)

    def _teacher(self, inputs: Mapping[str, Any], mask: torch.Tensor) -> torch.Tensor | TopLogits:
        """Hidden states of the teacher at the positions that count, or its largest logits, if they are kept."""
        penalties = self.trainer._penalties

        def states() -> tuple[torch.Tensor, LinearHead]:
            assert self._module is not None and self.head is not None and penalties.teacher is not None
            with head_input(self._module) as found:
                penalties.teacher({key: value for key, value in inputs.items() if key != EXAMPLE_IDS})
            hidden = found.take()
            return hidden[mask.to(hidden.device)], self.head.to(found.dtype)

        cache = penalties.cache
        if cache is None:
            return states()[0]
        k, temperature = cache.top_k, cache.penalty.temperature
        return penalties.cached(inputs, mask, lambda: top_logits_of(*states(), k, temperature))

    def _weights(
        self, strengths: Mapping[type, Any], inputs: Mapping[str, Any], count: torch.Tensor, rows: int, items: Any
    ) -> tuple[RowWeights, dict[str, str]]:
        """The weight of a row of each term, and under which name it is logged."""
        trainer, accumulation = self.trainer, self.trainer.current_gradient_accumulation_steps
        scaled = self._scaled(items)
        if trainer.model_accepts_loss_kwargs and items is not None:
            task = 1 / torch.as_tensor(items, device=count.device)
            if trainer.args.average_tokens_across_devices:
                task = task * (trainer.accelerator.num_processes // trainer.get_tp_size())
        else:
            task = 1 / count.clamp(min=1).float()
        if not scaled:
            task = trainer._task.weigh(task, inputs, accumulation)
        values: dict[str, Any] = {}
        names = {}
        for kind, (penalty, strength) in strengths.items():
            if kind is SvdConcentration:
                continue
            part = _part(penalty)
            if part == "diversity":
                values["top_k"] = penalty.top_k
            elif part == "consistency":
                values["temperature"] = penalty.temperature
            values[part] = strength * penalty_factor(scaled, accumulation) / max(rows, 1)
            names[part] = penalty.name
        return RowWeights(task.float(), **values), names
