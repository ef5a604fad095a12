"""What stands in a model where a patch acts, and how what passes there reaches the gates."""

from .attention import SEAM, AttentionSeam, Seam, gates, install, seams


__all__ = ["SEAM", "AttentionSeam", "Seam", "gates", "install", "seams"]
