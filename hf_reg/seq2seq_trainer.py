"""`RegularizedSeq2SeqTrainer`: [`RegularizedTrainer`] over transformers' trainer that evaluates generated texts."""

from __future__ import annotations

from dataclasses import dataclass

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
    """A [`~transformers.Seq2SeqTrainer`] with [`RegularizerMixin`]."""
