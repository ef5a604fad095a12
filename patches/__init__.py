"""One regularizer a file. Add a method here, and nowhere else in the package (CONTRIBUTING.md)."""

from hf_reg.base import Patch
from hf_reg.patches.drophead import DropHead
from hf_reg.patches.factorized import Factorized
from hf_reg.patches.ffn_dropout import FfnDropout
from hf_reg.patches.head_mask import HeadMask
from hf_reg.patches.residual_dropout import ResidualDropout
from hf_reg.patches.tlm import TLM
from hf_reg.patches.weight_compander import WeightCompander


__all__ = ["PATCHES", "TLM", "DropHead", "Factorized", "FfnDropout", "HeadMask", "ResidualDropout", "WeightCompander"]

PATCHES: dict[str, type[Patch]] = {
    "tlm": TLM,
    "drophead": DropHead,
    "head_mask": HeadMask,
    "ffn_dropout": FfnDropout,
    "residual_dropout": ResidualDropout,
    "weight_compander": WeightCompander,
    "factorized": Factorized,
}
