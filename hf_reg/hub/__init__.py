"""Checkpoints on the Hugging Face Hub."""

from .errors import PushError
from .push import push_to_hub


__all__ = ["PushError", "push_to_hub"]
