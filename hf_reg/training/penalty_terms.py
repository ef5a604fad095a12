"""The penalties of a run: what they need of the model is asked for once, and each is computed by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..base import Penalty
from ..penalties import TopLogits, top_logits
from ..penalties.rows import rows
from .example_ids import EXAMPLE_IDS
from .teacher import Teacher
from .teacher_cache import TeacherCache


__all__ = ["PenaltyTerms"]

OUTPUTS = frozenset({"logits", "hidden_states", "attentions"})


class PenaltyTerms:
    """Computes the penalties of a step.

    Args:
        penalties (sequence of [`Penalty`]): in the order in which they are computed.
        model (`nn.Module`): the unwrapped model as it is before the first step; each penalty may remember it.
        teacher (`nn.Module`, *optional*): a teacher of its own for those that need one.
        cache ([`TeacherCache`], *optional*): where the teacher's logits of training examples are kept.
    """

    def __init__(
        self,
        penalties: Sequence[Penalty],
        model: nn.Module,
        teacher: nn.Module | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        self.penalties = list(penalties)
        needs = (penalty.NEEDS for penalty in self.penalties)
        self.needs = frozenset[str](["example_ids"] if cache is not None else []).union(*needs)
        self._own_teacher, self.cache = teacher, cache
        self.dataset: Any = None  # whose examples have the ids, for the cache
        self.prepare(model)

    def prepare(self, model: nn.Module) -> None:
        """Start anew from `model`, untrained: anchors and teacher are taken from it."""
        self.teacher = Teacher(model, self._own_teacher) if "teacher" in self.needs else None
        if self.cache is not None:
            self.cache.forget()
        for penalty in self.penalties:
            penalty.prepare(model)

    @property
    def read_outputs(self) -> bool:
        """Whether any penalty looks at the model's outputs."""
        return not all(penalty.ON_PARAMETERS for penalty in self.penalties)

    @property
    def on_outputs_only(self) -> bool:
        """Whether no penalty looks at parameters by itself."""
        return not any(penalty.ON_PARAMETERS for penalty in self.penalties)

    def request(self, inputs: Mapping[str, Any]) -> dict[str, bool]:
        """Arguments for the model, so that its outputs hold what the penalties need."""
        wanted = (f"output_{name}" for name in ("hidden_states", "attentions") if name in self.needs)
        return {name: True for name in wanted if name not in inputs}

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        outputs: Any,
        progress: tuple[int, int, Sequence[float]],
        *,
        parameters: bool = True,
        batch: bool = True,
    ) -> dict[Penalty, torch.Tensor]:
        """Each penalty times its strength; those of strength 0 are not computed.

        Args:
            progress (tuple): step, total steps and validation losses so far, for the schedules.
            parameters, batch (`bool`, *optional*): whether to compute those on parameters, and those on the batch.
        """
        due = []
        for penalty in self.penalties:
            wanted = parameters if penalty.ON_PARAMETERS else batch
            if "example_ids" in penalty.NEEDS and EXAMPLE_IDS not in inputs and not model.training:
                wanted = False  # held-out examples have no number
            strength = penalty.strength(*progress) if wanted else 0.0
            if strength:
                due.append((penalty, strength))
        needs = frozenset[str]().union(*(penalty.NEEDS for penalty, _ in due))
        self._complete(model, inputs, outputs, needs)
        return {penalty: strength * self._value(penalty, model, inputs, outputs) for penalty, strength in due}

    def _complete(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any, needs: frozenset[str]) -> None:
        for name in sorted(needs & OUTPUTS):
            if getattr(outputs, name, None) is None:
                raise ValueError(
                    f"A penalty needs {name}, which {type(model).__name__} did not return. Attention probabilities "
                    "need attn_implementation='eager'; logits need a model with a head and an unfused loss."
                )
        if "example_ids" in needs and EXAMPLE_IDS not in inputs:
            raise ValueError(
                f"A penalty needs example ids, but the batch holds {sorted(inputs)}: the data collator dropped them. "
                f"Keep the key {EXAMPLE_IDS!r} there."
            )
        forwarded = {key: value for key, value in inputs.items() if key != EXAMPLE_IDS}
        if "teacher" in needs:
            object.__setattr__(outputs, "teacher", self._teacher_outputs(model, inputs, outputs))
        if "second_pass" in needs:
            second = model(**forwarded) if model.training else outputs  # without masks both passes are one
            object.__setattr__(outputs, "second_pass", second)

    def _teacher_outputs(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Any:
        """Of the teacher, or in training its largest logits, if they are kept."""
        teacher = self.teacher
        assert teacher is not None
        forwarded = {key: value for key, value in inputs.items() if key != EXAMPLE_IDS}
        if self.cache is None or not model.training:
            return teacher(forwarded)
        k, penalty = self.cache.top_k, self.cache.penalty
        mask = penalty.mask(model, inputs, outputs.logits)

        def compute() -> TopLogits:
            return top_logits(rows(penalty.find_logits(teacher(forwarded)), mask), k, penalty.temperature)

        return self.cached(inputs, mask, compute)

    def cached(
        self, inputs: Mapping[str, Any], mask: torch.Tensor | None, compute: Callable[[], TopLogits]
    ) -> TopLogits:
        """The teacher's largest logits from the cache, or else from `compute`; see [`TeacherCache`]."""
        assert self.cache is not None and self.teacher is not None
        return self.cache(inputs, mask, self.teacher, self.dataset, compute)

    def flush(self) -> None:
        """Write what the cache has not written yet."""
        if self.cache is not None:
            self.cache.flush()

    @staticmethod
    def _value(penalty: Penalty, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        value = penalty(model, inputs, outputs)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"Penalty {penalty.name!r} returned {found}; expected a tensor with one element.")
        return value.reshape(())
