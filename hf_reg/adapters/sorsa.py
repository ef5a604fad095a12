"""SORSA: an adapter of principal singular values and vectors that are kept orthonormal (arXiv 2409.00055)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from hf_reg.base import Penalty, check_choice
from hf_reg.distributed import whole
from hf_reg.penalties import Orthonormality
from hf_reg.penalties.orthonormal import slope

from .config import SvdAdapterConfig


__all__ = ["SorsaConfig", "orthonormal_step"]


@dataclass
class SorsaConfig(SvdAdapterConfig):
    """SORSA, *Singular Values and Orthonormal Regularized Singular Vectors Adaptation* (arXiv 2409.00055).

    `W x = W_0 x + s (U_p diag(S_p) V_p^T - U_0 diag(S_0) V_0^T) x`, where U_p, S_p and V_p start at the r principal
    singular triplets of W_0 and are all trained, while `L_reg = ||U_p^T U_p - I||_F + ||V_p^T V_p - I||_F` keeps the
    vectors orthonormal. The base weights stay untouched, so with the adapter off the model is the pretrained one.

    Args:
        gamma (`float`, *optional*, defaults to 4e-4):
            Strength of the regularization, gamma of the paper (its scripts: 4e-4 at a learning rate of 3e-5). It
            follows the learning rate: in a step with learning rate eta it is `gamma * eta / learning_rate`. Scale it
            with the learning rate of your run: the authors' ratio is 13.3.
        orthonormality (`str`, *optional*, defaults to `"decoupled"`):
            - `"decoupled"`: a step of its own after the optimizer's, p <- p - gamma_t grad L_reg (the paper's update);
            - `"coupled"`: a term of the loss with weight gamma / learning rate, whose gradient the optimizer rescales
              together with the task's (the authors' trainer);
            - `"off"`: none.
        squared (`bool`, *optional*, defaults to `False`):
            Squared norms. The gradient of the paper's unsquared form has norm 2 however small the violation.
        reduction (`str`, *optional*, defaults to `"sum"`):
            Over all matrices: `"sum"` (paper) or `"mean"` (the authors' trainer).
        r, lora_alpha, target_modules, folded, svd_tolerance, svd_seed, svd_cache_dir, kwargs:
            see [`SvdAdapterConfig`](hf_reg/adapters/config.py).

    Where we deviate from the authors' code: the SVD runs in fp32 (theirs in the dtype of the weights), the low-rank
    product is never materialised in training (theirs, in every step), and gamma depends neither on the number of
    accumulation steps nor, decoupled, on the optimizer.

    Raises:
        `ValueError`: for a setting that is out of range, or cannot be combined with an SVD adapter.

    Example:

    ```python
    model = get_regularized_peft_model(model, SorsaConfig(r=16, task_type="CAUSAL_LM"))
    RegularizedTrainer(model=model, args=args, train_dataset=train).train()
    ```
    """

    METHOD: ClassVar[str] = "sorsa"
    FORMULA: ClassVar[str] = (
        "W x = W_0 x + s (U_p diag(S_p) V_p^T - U_0 diag(S_0) V_0^T) x, "
        "L_reg = ||U_p^T U_p - I||_F + ||V_p^T V_p - I||_F"
    )
    HAS_VALUES: ClassVar[bool] = True

    gamma: float = field(default=4e-4, metadata={"help": "Strength of the orthonormality."})
    orthonormality: str = field(default="decoupled", metadata={"help": "decoupled, coupled or off."})
    squared: bool = field(default=False, metadata={"help": "Squared norms."})
    reduction: str = field(default="sum", metadata={"help": "sum or mean over the matrices."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("SorsaConfig", "orthonormality", self.orthonormality, ("decoupled", "coupled", "off"))
        check_choice("SorsaConfig", "reduction", self.reduction, Orthonormality.REDUCTION)
        if not 0 <= self.gamma < float("inf"):
            raise ValueError(f"SorsaConfig: gamma={self.gamma}; expected a finite number of at least 0.")

    def after_optimizer(self, model: nn.Module, adapter_name: str, share: float) -> dict[str, torch.Tensor]:
        if self.orthonormality != "decoupled" or self.gamma == 0:
            return {}
        gamma = self.gamma * share
        settings: dict[str, Any] = {"squared": self.squared, "reduction": self.reduction}
        return {"orthonormality": orthonormal_step(model, gamma, adapter_name=adapter_name, **settings)}

    def penalties(self, adapter_name: str, learning_rate: float) -> list[Penalty]:
        if self.orthonormality != "coupled" or self.gamma == 0:
            return []
        if not learning_rate > 0:
            raise ValueError(
                f"SorsaConfig: orthonormality='coupled' weighs its term by gamma / learning rate, and the learning "
                f"rate is {learning_rate}. Give a positive one, or orthonormality='decoupled'."
            )
        scope = [f"*.lora_{factor}.{adapter_name}.weight" for factor in "AB"]
        weight = self.gamma / learning_rate
        return [Orthonormality(weight=weight, scope=scope, squared=self.squared, reduction=self.reduction)]


@torch.no_grad()
def orthonormal_step(
    model: nn.Module, gamma: float, *, adapter_name: str = "default", squared: bool = False, reduction: str = "sum"
) -> torch.Tensor:
    """The decoupled half of a SORSA step, for loops without a trainer: p <- p - gamma grad L_reg, after the optimizer.

    Args:
        model (`nn.Module`): a `PeftModel` with a SORSA adapter.
        gamma (`float`): gamma_t, which follows the schedule of the learning rate.
        adapter_name (`str`, *optional*, defaults to `"default"`).
        squared, reduction: see [`SorsaConfig`].

    Returns:
        `torch.Tensor` of shape `()`: L_reg before the step.

    Raises:
        `ValueError`: if `model` has no SORSA adapter of this name in training.
    """
    layers: list[Any] = [module for module in model.modules() if adapter_name in getattr(module, "lora_S", {})]
    matrices = [
        weight
        for layer in layers
        for weight in (layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight)
        if weight.requires_grad
    ]
    if not matrices:
        raise ValueError(f"{type(model).__name__} has no SORSA adapter {adapter_name!r} in training.")
    share = gamma / (len(matrices) if reduction == "mean" else 1)
    total = []
    for matrix in matrices:
        value, gradient = slope(whole(matrix), squared=squared)
        if hasattr(matrix, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            gradient = distribute_tensor(gradient, matrix.device_mesh, matrix.placements)
        matrix.sub_(gradient, alpha=share)
        total.append(value)
    result = torch.stack([value.to(total[0].device) for value in total]).sum()
    return result / len(matrices) if reduction == "mean" else result
