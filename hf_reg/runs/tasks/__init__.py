"""Tasks that a recipe can name. A further one is a module with a [`Recipe`] class, and a line here."""

from ..recipe import Recipe
from .causal_lm import CausalLM
from .preference import Preference
from .question_answering import QuestionAnswering
from .seq2seq import Seq2Seq
from .sequence_classification import SequenceClassification
from .token_classification import TokenClassification


__all__ = [
    "TASKS", "CausalLM", "Preference", "QuestionAnswering", "Seq2Seq", "SequenceClassification", "TokenClassification",
]  # fmt: skip

TASKS: dict[str, type[Recipe]] = {
    one.TASK: one
    for one in (Preference, CausalLM, SequenceClassification, TokenClassification, QuestionAnswering, Seq2Seq)
}
