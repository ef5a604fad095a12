"""Tensor dropout: drop components of low-rank layers at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hf_reg.base import Patch, RateGate, check_choice, check_range
from hf_reg.sites.rank import RankSite


__all__ = ["TensorDropout"]


@dataclass(frozen=True)
class TensorDropout(Patch):
    """Tensor dropout: drops components of the rank of low-rank layers, such as LoRA adapters, at random.

    From *Tensor Dropout for Robust Learning* (IEEE JSTSP 2021, arXiv 1902.10758), which sketches the rank of CP and
    Tucker decompositions with Bernoulli variables. For a matrix both are W = U diag(lambda / theta) V^T, lambda_k ~
    Bernoulli(theta), theta = 1 - p, whose mean is U V^T: here on B and A of LoRA (B diag(lambda / theta) A x, the
    frozen weight untouched) and on layers that mark their rank (`hf_reg/sites/rank.py`). Evaluation is untouched.

    The paper was not read: its 1 / theta is from memory. The authors' TensorLy-Torch, which was, keeps at least one
    component and does not rescale; here the scale keeps the mean, and all components may drop (with probability p^r).
    It differs from `lora_dropout`, which drops inputs of A.

    Adapters whose variant computes with the factors themselves (DoRA, SORSA and BA-LoRA here) are refused. An adapter
    that is added later needs `patch_model` once more.

    Args:
        p (`float`, *optional*, defaults to 0.1): probability to drop a component, in [0, 1). Our choice.
        granularity (`str`, *optional*, defaults to `"batch"`):
            One draw a `"batch"` (the paper's: the weight is sketched), or one an `"example"`: a row of what passes.
        layers, submodel, schedule: see [`Patch`].
    """

    name: ClassVar[str] = "tensor_dropout"
    formula: ClassVar[str] = "U V^T <- U diag(lambda / (1 - p)) V^T, lambda_k ~ Bernoulli(1 - p)"
    seam: ClassVar[str] = "rank"
    acts_on: ClassVar[str] = "a low-rank layer"
    rate_field: ClassVar[str] = "p"

    p: float = 0.1
    granularity: str = "batch"

    def __post_init__(self) -> None:
        check_range("tensor_dropout", "p", self.p, 0, 1)
        check_choice("tensor_dropout", "granularity", self.granularity, ("batch", "example"))
        super().__post_init__()

    def check(self, model: nn.Module, site: RankSite) -> None:
        if site.variant:
            raise ValueError(
                f"tensor_dropout: the adapter {site.path} is a {site.variant}, which computes with its factors and "
                "has no activation between them; use plain LoRA, or leave it out with `layers=` or `submodel=`."
            )

    def gate(self, site: RankSite) -> TensorDropoutGate:
        return TensorDropoutGate(self, site.dim)


class TensorDropoutGate(RateGate):
    """Drops components of one rank."""

    patch: TensorDropout

    def __init__(self, patch: TensorDropout, dim: int) -> None:
        super().__init__(patch)
        self.dim = dim

    def transform(self, states: torch.Tensor) -> torch.Tensor:
        shape = [1] * states.dim()
        shape[self.dim] = states.shape[self.dim]
        if self.patch.granularity == "example":
            shape[0] = states.shape[0]
        return self.drop(states, shape)
