"""One regularizer a file. Add a method here, and nowhere else in the package (CONTRIBUTING.md)."""

from hf_reg.base import Patch
from hf_reg.patches.adaptive_dropout import AdaptiveDropout
from hf_reg.patches.attention_dropout import AttentionDropout
from hf_reg.patches.drop_block import DropBlock
from hf_reg.patches.drophead import DropHead
from hf_reg.patches.dynamic_dropout import DynamicDropout
from hf_reg.patches.factorized import Factorized
from hf_reg.patches.ffn_dropout import FfnDropout
from hf_reg.patches.head_mask import HeadMask
from hf_reg.patches.hidden_dropout import HiddenDropout
from hf_reg.patches.layer_drop import LayerDrop
from hf_reg.patches.nested_dropout import NestedDropout
from hf_reg.patches.residual_dropout import ResidualDropout
from hf_reg.patches.standout import Standout
from hf_reg.patches.tensor_dropout import TensorDropout
from hf_reg.patches.tlm import TLM
from hf_reg.patches.weight_compander import WeightCompander


__all__ = [
    "PATCHES", "TLM", "AdaptiveDropout", "AttentionDropout", "DropBlock", "DropHead", "DynamicDropout", "Factorized",
    "FfnDropout", "HeadMask", "HiddenDropout", "LayerDrop", "NestedDropout", "ResidualDropout", "Standout",
    "TensorDropout", "WeightCompander",
]  # fmt: skip

PATCHES: dict[str, type[Patch]] = {
    "tlm": TLM,
    "drophead": DropHead,
    "head_mask": HeadMask,
    "ffn_dropout": FfnDropout,
    "residual_dropout": ResidualDropout,
    "layer_drop": LayerDrop,
    "drop_block": DropBlock,
    "nested_dropout": NestedDropout,
    "tensor_dropout": TensorDropout,
    "attention_dropout": AttentionDropout,
    "hidden_dropout": HiddenDropout,
    "dynamic_dropout": DynamicDropout,
    "standout": Standout,
    "adaptive_dropout": AdaptiveDropout,
    "weight_compander": WeightCompander,
    "factorized": Factorized,
}
