"""Preference data: rows of prompt, chosen and rejected answer, as token ids and as batches."""

from .collator import PreferenceCollator
from .data import prepare_preferences
from .tokens import TRUNCATION_MODES, cut


__all__ = ["TRUNCATION_MODES", "PreferenceCollator", "cut", "prepare_preferences"]
