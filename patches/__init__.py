"""One regularizer a file. Add a method here, and nowhere else in the package (CONTRIBUTING.md)."""

from hf_reg.base import Patch

from .drophead import DropHead
from .head_mask import HeadMask
from .tlm import TLM


__all__ = ["PATCHES", "DropHead", "HeadMask", "TLM"]

PATCHES: dict[str, type[Patch]] = {"tlm": TLM, "drophead": DropHead, "head_mask": HeadMask}
