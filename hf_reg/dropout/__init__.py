"""`set_dropout`: the model's own dropout set by kind, added where it has none, and proof of what drops."""

from .added import AddedDropout
from .report import DropoutReport, DropoutRow
from .setting import set_dropout


__all__ = ["AddedDropout", "DropoutReport", "DropoutRow", "set_dropout"]
