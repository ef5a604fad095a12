"""What a run says: on its first process, where every process finds out the same."""

from __future__ import annotations

import os

from transformers.utils import logging


__all__ = ["say"]

logger = logging.get_logger("transformers.hf_reg")


def say(text: str) -> None:
    """A log message of level warning, which `Trainer` shows by default, from the first of all processes."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text)
