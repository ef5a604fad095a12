"""The layer of an SVD adapter: a frozen linear map plus what the adapter's product has gained since the start."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import SvdAdapterConfig
from .product import Difference, Start, product_factors
from .svd import Factors


__all__ = ["SvdLinear", "base_weight", "is_quantised", "refuse_layer"]


def is_quantised(layer: Any) -> bool:
    """Whether the weight of a layer holds codes instead of values, by bitsandbytes (in whatever storage) or others."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return True
    kinds = ("bitsandbytes.", "torchao.")
    return not weight.is_floating_point() or type(weight).__module__.startswith(kinds)


def base_weight(layer: nn.Module) -> torch.Tensor:
    """The weight (out, in) of a linear layer or GPT-2's Conv1D, dequantised where it is quantised.

    Raises:
        `ValueError`: for a layer without a weight that can be read.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor) and is_quantised(layer):
        quantised, weight = weight, dequantize_module_weight(layer)
        if layer.weight is not quantised:  # on a CPU it leaves a copy there, which has lost its scales
            layer.weight = quantised
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"{type(layer).__name__} has no weight to decompose: leave it out of target_modules.")
    return transpose(weight.detach(), isinstance(layer, Conv1D))


class _SvdVariant(LoraVariant):
    """PEFT's hook for a layer whose adapter is more than B A; it keeps nothing."""

    def supports_lora_conversion(self) -> bool:
        return False  # `save_pretrained` writes the exact plain LoRA instead

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """The factors come with `SvdLinear.begin`, for all layers at once."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        delta = module.get_delta_weight(active_adapter)
        return (orig_weight.float() + delta.float()).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data = _SvdVariant.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        delta = module.get_delta_weight(active_adapter)
        return (orig_weight.float() - delta.float()).to(orig_weight.dtype)

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        start = module.start_of(active_adapter)
        return Difference.apply(
            result,
            module.lora_dropout[active_adapter](x),
            module.lora_A[active_adapter].weight,
            module.lora_B[active_adapter].weight,
            module.lora_S[active_adapter] if active_adapter in module.lora_S else None,
            *start.subtracted,
            module.scaling[active_adapter],
        )


class SvdLinear(Linear):
    """PEFT's LoRA layer for Linear and Conv1D whose adapters may be SVD adapters; others are plain LoRA as ever.

    `lora_A` (r, in), `lora_B` (out, r) and, for SORSA, `lora_S` (r,) are trained; `lora_start` holds their first
    values. The base layer is called as it is, quantised or not.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.is_target_conv_1d_layer = self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    adapter_layer_names: tuple[str, ...]
    lora_start: nn.ModuleDict

    @staticmethod
    def of(layer: Linear) -> SvdLinear:
        """Make a plain LoRA layer one of these, in place."""
        layer.__class__ = SvdLinear
        return layer

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> LoraVariant | None:
        if isinstance(config, SvdAdapterConfig):
            return _SvdVariant()
        return super().resolve_lora_variant(config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int | None, config: Any, **kwargs: Any) -> None:
        if not isinstance(config, SvdAdapterConfig):
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
            return
        if not hasattr(self, "lora_S"):
            self.lora_S = nn.ParameterDict()
            self.lora_start = nn.ModuleDict()
            self.adapter_layer_names = (*self.adapter_layer_names, "lora_S", "lora_start")
        super().update_layer(adapter_name, r, lora_alpha or r, config=config, **kwargs)
        for factor in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
            # forward reads the weights themselves: with a child, PEFT's FSDP policy does not make a factor a unit of
            # its own, whose weight would be gathered in its own forward only
            factor.add_module("of_layer", nn.Identity())
        if config.HAS_VALUES:
            weight = self.lora_A[adapter_name].weight
            self.lora_S[adapter_name] = nn.Parameter(weight.new_ones(r))
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def begin(self, adapter_name: str, factors: Factors, folded: bool) -> None:
        """Start an adapter at the principal singular triplets of the base weight."""
        left, values, right = factors.left, factors.values, factors.right
        if adapter_name not in self.lora_S:
            root = (values / self.scaling[adapter_name]).sqrt()
            left, right = left * root, right * root[:, None]
        own = {"lora_A": right, "lora_B": left} | ({"lora_S": values} if adapter_name in self.lora_S else {})
        self.restore(adapter_name, own, own, folded)

    def restore(
        self, adapter_name: str, factors: dict[str, torch.Tensor], start: dict[str, torch.Tensor], folded: bool
    ) -> None:
        """Set an adapter's factors and those that it started from (`lora_A`, `lora_B` and, for SORSA, `lora_S`)."""
        parameters = self.parameters_of(adapter_name)
        first = {}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(factors[name])
                first[name] = start[name].to(parameter).clone()
            if adapter_name in self.lora_start:
                self.unfold(adapter_name)
            self.lora_start[adapter_name] = Start(first["lora_A"], first["lora_B"], first.get("lora_S"), folded)
            if folded:
                self._shift_base(adapter_name, -1.0)

    def parameters_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The trained factors by their name."""
        found = {"lora_A": self.lora_A[adapter_name].weight, "lora_B": self.lora_B[adapter_name].weight}
        if adapter_name in self.lora_S:
            found["lora_S"] = self.lora_S[adapter_name]
        return found

    def start_of(self, adapter_name: str) -> Start:
        """What the adapter started from.

        Raises:
            `RuntimeError`: if it was added without being initialised.
        """
        if adapter_name not in self.lora_start:
            raise RuntimeError(
                f"Adapter {adapter_name!r} was never initialised: add it with "
                "hf_reg.get_regularized_peft_model(model, config), not with peft.get_peft_model."
            )
        return cast(Start, self.lora_start[adapter_name])

    def plain_factors(
        self, adapter_name: str, factors: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same map as a plain LoRA of rank 2r and scaling 1 on the untouched weight: A (2r, in), B (out, 2r).

        `factors` (a gathered state dict's, say) are taken instead of the layer's own.
        """
        own: Any = factors or self.parameters_of(adapter_name)
        start = self.start_of(adapter_name)
        own = {name: tensor.detach().to(start.a.device) for name, tensor in own.items()}
        a, b, values = own["lora_A"], own["lora_B"], own.get("lora_S")
        left, right = product_factors(a, b, values, start.a, start.b, start.values, torch.float32)
        return right, left * self.scaling[adapter_name]

    def pretrained_weight(self) -> torch.Tensor:
        """The weight (out, in) as it was before any adapter, dequantised; to rounding where an adapter is folded."""
        weight = base_weight(self.get_base_layer())
        for name, start in getattr(self, "lora_start", {}).items():
            if start.folded:
                weight = weight.to(torch.float32) + start.product() * self.scaling[name]
        return weight

    def change(self, adapter_name: str) -> torch.Tensor:
        """What an adapter adds to the pretrained weight (out, in), in fp32."""
        if not self.is_svd(adapter_name):
            return transpose(self.get_delta_weight(adapter_name), self.fan_in_fan_out).float()
        down, up = self.plain_factors(adapter_name)
        return up @ down

    def is_svd(self, adapter_name: str) -> bool:
        return isinstance(self.lora_variant.get(adapter_name), _SvdVariant)

    def _shift_base(self, adapter_name: str, sign: float) -> None:
        """Add the adapter's first product to the base weight, or take it away."""
        layer: Any = self.get_base_layer()
        product = transpose(self.start_of(adapter_name).product(), self.fan_in_fan_out)
        product = product * (sign * self.scaling[adapter_name])
        layer.weight.data = (layer.weight.data.to(product.dtype) + product).to(layer.weight.dtype)

    def unfold(self, adapter_name: str) -> None:
        """Give the base weight of a folded adapter its product back; the adapter goes on in the default mode."""
        start = self.start_of(adapter_name)
        if start.folded:
            self._shift_base(adapter_name, 1.0)
            start.folded = False

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging adds to the base weight, in the layout of that weight and in fp32."""
        if not self.is_svd(adapter):
            return super().get_delta_weight(adapter)
        start = self.start_of(adapter)
        own = self.parameters_of(adapter)
        a, b, values = own["lora_A"], own["lora_B"], own.get("lora_S")
        left, right = product_factors(a, b, values, *start.subtracted, torch.float32)
        return transpose(left.detach() @ right.detach(), self.fan_in_fan_out) * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        weight: Any = self.get_base_layer().weight
        if is_quantised(self.get_base_layer()):
            raise ValueError(
                f"The base weight is quantised ({weight.dtype}), so merging would lose the adapter in its rounding. "
                "Save the adapter (save_pretrained writes plain LoRA) and merge it into the model in bf16 or fp32."
            )
        super().merge(safe_merge, adapter_names)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = super().forward(x, *args, **kwargs)
        if not hasattr(self, "lora_start"):
            return result
        for name, start in self.lora_start.items():
            assert isinstance(start, Start)
            active = not self.disable_adapters and (name in self.active_adapters or name in self.merged_adapters)
            if start.folded and not active:
                factors = start.a, start.b, start.values, None, None, None
                sum_ = Difference.apply(result, x.to(start.a.dtype), *factors, self.scaling[name])
                result = sum_.to(result.dtype)
        return result


def refuse_layer(target: nn.Module, adapter_name: str, config: Any, target_name: str = "", **kwargs: Any) -> None:
    """What PEFT calls for a selected layer of another kind: always raises `ValueError`."""
    raise ValueError(
        f"{type(config).__name__} starts from the SVD of Linear and Conv1D layers, but target_modules also selects "
        f"{target_name} ({type(target).__name__}). Narrow target_modules, or name it in exclude_modules."
    )
