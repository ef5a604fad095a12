"""Tasks that a recipe can name. A further one is a module with a [`Recipe`] class, and a line here."""

from ..recipe import Recipe
from .causal_lm import CausalLM
from .preference import Preference
from .sequence_classification import SequenceClassification


__all__ = ["TASKS", "CausalLM", "Preference", "SequenceClassification"]

TASKS: dict[str, type[Recipe]] = {one.TASK: one for one in (Preference, CausalLM, SequenceClassification)}
