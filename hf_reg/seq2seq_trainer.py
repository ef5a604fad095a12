"""`RegularizedSeq2SeqTrainer`: [`RegularizedTrainer`] over transformers' trainer that evaluates generated texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from .trainer import RegularizerMixin
from .training.arguments import RegularizedArguments


__all__ = ["RegularizedSeq2SeqTrainer", "RegularizedSeq2SeqTrainingArguments"]


@dataclass
class RegularizedSeq2SeqTrainingArguments(RegularizedArguments, Seq2SeqTrainingArguments):
    __doc__ = (Seq2SeqTrainingArguments.__doc__ or "") + (RegularizedArguments.__doc__ or "")

    def __post_init__(self) -> None:
        self.check_regularization()
        super().__post_init__()


class RegularizedSeq2SeqTrainer(RegularizerMixin, Seq2SeqTrainer):
    """A [`~transformers.Seq2SeqTrainer`] with [`RegularizerMixin`].

    On several processes every row is scored once, as [`~transformers.Trainer`] does it: `Seq2SeqTrainer` itself also
    scores the rows that fill up the last batch a second time.
    """

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)
