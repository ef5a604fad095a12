"""Model cards: what a model was regularized with, how it did with and without, and how to load it."""

from .checks import check_metadata
from .facts import Facts, Use, facts_of
from .writing import BEGIN, CURVE, END, FACTS, card_of, write_card


__all__ = ["BEGIN", "CURVE", "END", "FACTS", "Facts", "Use", "card_of", "check_metadata", "facts_of", "write_card"]
