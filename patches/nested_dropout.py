"""Nested dropout: cut off the channels of an FFN after a random index, so that they learn an order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_reg.base import Patch, RateGate, check_choice, check_range
from hf_reg.distributed import whole
from hf_reg.seams.layer_pass import LayerPass, check_batch_first, share_pass
from hf_reg.sites.ffn import FfnSite, find_ffn


__all__ = ["NestedDropout", "channel_importance"]

REMEDY = "use granularity='batch', or leave this part out with `layers=` or `submodel=`"


@dataclass(frozen=True)
class NestedDropout(Patch):
    """Nested dropout: keeps the first b channels of the activation of every FFN, with a random b, so that the channels
    come to matter in their order.

    From *Learning Ordered Representations with Nested Dropout* (ICML 2014, arXiv 1402.0915), where it orders the code
    of an autoencoder; in FFNs of Transformers it is our adaptation. There b is geometric, P(b) = rho^(b - 1)
    (1 - rho) for b = 1, 2, ..., and whatever lies beyond the K channels keeps all of them. So channel k is kept with
    probability P(b >= k) = rho^(k - 1), and the last one dropped with probability 1 - rho^(K - 1). That is our rate:
    p = 1 - rho^(K - 1), or rho = (1 - p)^(1 / (K - 1)), and channel k is kept with probability
    (1 - p)^((k - 1) / (K - 1)). It means the same for every width, and p = 0 is the identity. On average a part
    1 + p / log(1 - p) of the channels is dropped (K large): about p / 2.

    Nothing is rescaled, as in the paper, where evaluation uses the whole code: what is kept does not change its size,
    and the mean is not kept. The paper's unit sweeping, which freezes channels once they have converged, is left out.
    In a mixture of experts, whose tokens belong to no known example, each token has a b of its own.

    [`channel_importance`] reads out what the channels of each FFN weigh.

    Args:
        p (`float`, *optional*, defaults to 0.1):
            Probability to drop the last channel, in [0, 1). Our choice; the published rho could not be verified.
        granularity (`str`, *optional*, defaults to `"example"`): one b an `"example"`, or one a `"batch"`.
        layers, submodel, schedule: see [`Patch`].
    """

    name: ClassVar[str] = "nested_dropout"
    formula: ClassVar[str] = "h_k <- h_k 1[k <= b], P(b >= k) = (1 - p)^((k - 1) / (K - 1))"
    seam: ClassVar[str] = "ffn"
    acts_on: ClassVar[str] = "an FFN whose activation can be reached"
    rate_field: ClassVar[str] = "p"

    p: float = 0.1
    granularity: str = "example"

    def __post_init__(self) -> None:
        check_range("nested_dropout", "p", self.p, 0, 1)
        check_choice("nested_dropout", "granularity", self.granularity, ("example", "batch"))
        super().__post_init__()

    def accepts(self, site: FfnSite) -> bool:
        return site.kind != "experts"  # only the input of these can be reached, which has other channels

    def check(self, model: nn.Module, site: FfnSite) -> None:
        if self.granularity == "example":
            check_batch_first("nested_dropout", site, REMEDY)

    def gate(self, site: FfnSite) -> NestedDropoutGate:
        return NestedDropoutGate(self, site)


class NestedDropoutGate(RateGate):
    """Cuts off the channels of one FFN."""

    patch: NestedDropout

    def __init__(self, patch: NestedDropout, site: FfnSite) -> None:
        super().__init__(patch)
        self.path, self.dim = site.path, site.dim
        self.routed = "expert" in site.path and "shared" not in site.path
        self.layer_pass = LayerPass()

    def attach(self, model: nn.Module, site: FfnSite) -> None:
        self.layer_pass = share_pass(model, site, self)

    def rows(self, states: torch.Tensor) -> torch.Tensor:
        """`states` with what takes one draw in the first dimension."""
        if self.patch.granularity == "batch":
            return states[None]
        if states.dim() == 2 and (self.routed or not self.layer_pass.flattened(states)):
            return states
        return self.layer_pass.by_example(states, f"nested_dropout at {self.path}", REMEDY)

    def transform(self, states: torch.Tensor) -> torch.Tensor:
        rows, width = self.rows(states), states.shape[self.dim]
        place = torch.arange(width, device=states.device) / max(width - 1, 1)
        keep = torch.rand(rows.shape[0], 1, device=states.device) < (1 - self.rate) ** place  # b >= k, by inversion
        shape = [rows.shape[0]] + [1] * (rows.dim() - 1)
        shape[self.dim - states.dim() if self.dim > 0 else self.dim] = width
        return (rows * keep.view(shape).to(states.dtype)).view(states.shape)


def _weight(module: Any) -> torch.Tensor:
    """What a down-projection multiplies its channels with, (outputs, channels), LoRA's share included."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = whole(base.weight)
    weight = weight.T if isinstance(base, Conv1D) else weight.flatten(1) if weight.dim() > 2 else weight
    if hasattr(module, "lora_A") and not module.disable_adapters and not module.merged:
        for name in module.active_adapters:
            if name in module.lora_A:
                added = module.get_delta_weight(name)
                weight = weight + (added.T if isinstance(base, Conv1D) else added).reshape(weight.shape)
    return weight


@torch.no_grad()
def channel_importance(model: nn.Module) -> dict[str, torch.Tensor]:
    """How much each channel of an FFN weighs in what the FFN puts out: the norm of its column in the down-projection.

    It knows the weights only: a channel whose activation is always small counts by its weights all the same. Compare
    channels of one FFN, not of different ones. Experts in one tensor are left out.

    Args:
        model (`nn.Module`): a transformers model, patched or not, with PEFT adapters or without.

    Returns:
        `dict[str, torch.Tensor]`: for each FFN, by the path of its down-projection, (channels,) float.

    Raises:
        `ValueError`: if the model has no FFN with a down-projection of its own.
    """
    found = {site.path: _weight(site.module).float().norm(dim=0) for site in find_ffn(model) if site.width}
    if not found:
        raise ValueError(f"{type(model).__name__} has no FFN whose down-projection can be read.")
    return found
