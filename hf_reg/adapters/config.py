"""What the configurations of SVD adapters have in common: LoRA's fields, and those of the initialisation."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import peft
import torch
from packaging.version import Version
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D


if TYPE_CHECKING:
    from hf_reg.base import Penalty

__all__ = ["SvdAdapterConfig"]

OLDEST = Version("0.19")  # layers take their configuration whole, as `SvdLinear.update_layer` does
OFF = {"use_dora", "lora_bias", "use_qalora", "ensure_weight_tying"}
IMPLIED = {"runtime_config", "inference_mode", "peft_type", "peft_version", "auto_mapping"}
NONE = {
    "megatron_config", "layer_replication", "target_parameters", "alora_invocation_tokens", "use_bdlora",
    "arrow_config", "kasa_config", "velora_config", "monteclora_config", "eva_config", "corda_config",
    "lora_ga_config",
}  # fmt: skip


@dataclass
class SvdAdapterConfig(LoraConfig):
    """Settings of an adapter that starts from the principal singular triplets of the weights.

    Args:
        r (`int`, *optional*, defaults to 16):
            Rank. We chose it; both papers use 128 for models of 7B parameters. At most the short side of a weight.
        lora_alpha (`int`, *optional*):
            Scaling s = `lora_alpha / r`; `None`, the papers' setting, means s = 1.
        target_modules (`str` or list of `str`, *optional*, defaults to `"all-linear"`):
            As in [`~peft.LoraConfig`]. The papers adapt q, k, v, o, gate, up and down: all linear layers.
        folded (`bool`, *optional*, defaults to `False`):
            Store the residual W - s W_p in the base weight: a step costs what one of plain LoRA does, and the base
            model is restored (by adding the product where the adapter is off) to rounding instead of bit for bit.
        svd_tolerance (`float`, *optional*, defaults to 2e-4): of the initialisation, see [`decompose`].
        svd_seed (`int`, *optional*, defaults to 0): of the initialisation.
        svd_cache_dir (`str`, *optional*): folder where decompositions are kept, see [`decompose_layers`].
        kwargs: every other field of [`~peft.LoraConfig`]; those that change what a LoRA layer computes are refused.

    Raises:
        `ValueError`: for a field that cannot be combined with an SVD adapter.
    """

    METHOD: ClassVar[str]
    FORMULA: ClassVar[str] = ""  # for model cards
    HAS_VALUES: ClassVar[bool]  # whether the singular values are factors of their own

    r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scaling times r; None means no scaling."})
    target_modules: Any = field(default="all-linear", metadata={"help": "As in LoraConfig."})
    folded: bool = field(default=False, metadata={"help": "Keep the residual in the base weight."})
    svd_tolerance: float = field(default=2e-4, metadata={"help": "Tolerance of the initialisation."})
    svd_seed: int = field(default=0, metadata={"help": "Seed of the initialisation."})
    svd_cache_dir: str | None = field(default=None, metadata={"help": "Folder of cached decompositions."})

    def __post_init__(self) -> None:
        if Version(peft.__version__) < OLDEST:
            raise ImportError(
                f"hf_reg.adapters needs peft >= {OLDEST}, found {peft.__version__}: pip install -U peft."
            )
        super().__post_init__()
        name = type(self).__name__
        set_fields = [key for key in sorted(OFF) if getattr(self, key, False)]
        set_fields += [key for key in sorted(NONE) if getattr(self, key, None) is not None]
        if self.init_lora_weights is not True:
            set_fields.append("init_lora_weights")
        if set_fields:
            raise ValueError(
                f"{name}: {', '.join(set_fields)} cannot be combined with an adapter that starts from the SVD of the "
                "weights. Leave it at its default, or use peft.LoraConfig."
            )
        if self.use_rslora and self.lora_alpha is None:
            raise ValueError(f"{name}: use_rslora scales by lora_alpha / sqrt(r), but lora_alpha is None. Give it.")
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": value for key, value in (self.rank_pattern or {}).items()}}
        for key, value in ranks.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {key}={value!r}; expected an integer of at least 1.")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"{name}: lora_alpha={self.lora_alpha}; expected a positive number, or None for s = 1.")
        if self.lora_alpha is None and self.alpha_pattern:
            raise ValueError(f"{name}: alpha_pattern is given, but lora_alpha is None (no scaling). Give lora_alpha.")
        if not self.svd_tolerance > 0:
            raise ValueError(f"{name}: svd_tolerance={self.svd_tolerance}; expected a positive number such as 2e-4.")
        from .linear import SvdLinear, refuse_layer

        self._register_custom_module({nn.Linear: SvdLinear, Conv1D: SvdLinear, nn.Module: refuse_layer})

    def penalties(self, adapter_name: str, learning_rate: float) -> list[Penalty]:
        """The terms that this method adds to the loss of a run with this learning rate."""
        return []

    def after_optimizer(self, model: nn.Module, adapter_name: str, share: float) -> dict[str, torch.Tensor]:
        """What this method does after a step of the optimizer whose learning rate was `share` of the run's; returns
        what it measured, by name."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain values: enough to build the configuration again."""
        own = {}
        for one in fields(self):
            value = getattr(self, one.name)
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            if one.init and value != default and one.name not in IMPLIED:
                own[one.name] = sorted(value) if isinstance(value, set) else value
        return own

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        raise RuntimeError(
            f"{type(self).__name__} is no configuration that PEFT could load. Save the model: save_pretrained of what "
            "get_regularized_peft_model returned writes a plain LoRA adapter and hf_reg.json."
        )
