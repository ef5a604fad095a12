"""L2-SP as a step of its own after the optimizer's, as AdamW decays weights, but towards the pretrained ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from ..base import check_range
from ..distributed import ADAPTERS, named_scoped_parameters, whole
from ..messages import say
from ..penalties import L2SP
from .companion import Companion, local


__all__ = ["DecoupledL2SP"]


@dataclass(eq=False)
class DecoupledL2SP(Companion):
    """After the optimizer's step: p <- p - lr * alpha * (p - p0), and p <- p - lr * beta * p for new parameters.

    The penalty L2-SP of *Explicit Inductive Bias for Transfer Learning with Convolutional Networks* (arXiv
    1802.01483), decoupled from Adam's normalisation as AdamW decouples weight decay: how strongly a weight is pulled
    back does not depend on the size of its gradients. lr is that of the parameter's group in this step. A parameter
    without a gradient does not move.

    p0 is the weight at `prepare`: when the `Trainer` is made, or in a loop at `attach`. It is kept in the weight's own
    precision, once: as much memory as the weights (under FSDP2, while training, as this process's shard of them).
    A checkpoint of [`~hf_reg.RegularizedTrainer`] holds it; the plain `Trainer` resumes right if the model that it is
    given is the pretrained one again. Weights in bf16 lose steps smaller than their rounding, as with AdamW's decay.

    Args:
        alpha (`float`, *optional*, defaults to 0.1): our choice: of the size of a usual weight decay of AdamW.
        beta (`float`, *optional*, defaults to 0.0): 0 leaves new parameters to the optimizer's own weight decay.
        new (`str` or sequence of `str`, *optional*, defaults to `("*classifier*", "*score*", "*qa_outputs*")`):
            Glob patterns of newly initialised parameters, which have no anchor; the usual heads of transformers.
        scope (`str` or sequence of `str`, *optional*, defaults to `"trainable"`): as in [`~hf_reg.base.Penalty`].

    Raises:
        `ValueError`: for a model with an adapter, an optimizer without a learning rate or with one so large that a
        step would overshoot, and parameters that do not fit the anchor.
    """

    NAME: ClassVar[str] = "decoupled_l2_sp"
    FORMULA: ClassVar[str] = (
        "p <- p - lr alpha (p - p0) after the optimizer's step; of new parameters p <- p - lr beta p"
    )

    alpha: float = 0.1
    beta: float = 0.0
    new: str | Sequence[str] = L2SP.new
    scope: str | Sequence[str] = "trainable"

    def __post_init__(self) -> None:
        self._anchor = L2SP(alpha=self.alpha, beta=self.beta, new=self.new, scope=self.scope, name=self.NAME)
        self._names: dict[torch.Tensor, str] = {}

    def prepare(self, model: nn.Module) -> None:
        adapters = [
            name
            for name, p in model.named_parameters()
            if p.requires_grad and any(fnmatchcase(name, pattern) for pattern in ADAPTERS)
        ]
        if adapters:
            raise ValueError(
                f"{self.NAME}: the model trains an adapter ({adapters[0]}), and its pretrained weights do not move: "
                "there is nothing to anchor. The optimizer's weight_decay on the adapter pulls towards them already."
            )
        self._anchor.prepare(model)

    def bind(self, optimizer: Optimizer, model: nn.Module | None) -> None:
        if model is None:
            raise ValueError(f"{self.NAME}: attach(optimizer, model) needs the model, whose names tell the head.")
        if not self._anchor.anchors:
            self.prepare(model)
        names = {p: name for name, p in model.named_parameters()}
        scoped = {name for name, _ in named_scoped_parameters(model, self.scope)}
        self._names = {}
        decayed = 0.0
        for group in optimizer.param_groups:
            if group.get("lr") is None:
                raise ValueError(f"{self.NAME}: {type(optimizer).__name__} chooses its steps itself. Give it an lr.")
            check_range(self.NAME, "lr * alpha", float(group["lr"]) * self.alpha, 0, 1)
            check_range(self.NAME, "lr * beta", float(group["lr"]) * self.beta, 0, 1)
            for p in group["params"]:
                if p not in names:
                    raise ValueError(
                        f"{self.NAME}: the optimizer holds a parameter {tuple(p.shape)} that is not of this model. "
                        "Make both from the same model, after it is sharded."
                    )
                anchor = self._anchor.anchors.get(names[p])
                if anchor is not None and anchor.shape != p.shape:
                    raise ValueError(
                        f"{self.NAME}: the anchor of {names[p]} is {tuple(anchor.shape)}, but the weight is "
                        f"{tuple(p.shape)} now. Change the model before the trainer is made."
                    )
                if names[p] in scoped and (anchor is not None or not self._anchor.anchored(names[p])):
                    self._names[p] = names[p]
                if anchor is not None:
                    decayed = max(decayed, group.get("weight_decay", 0.0))
        if not any(name in self._anchor.anchors for name in self._names.values()):
            raise ValueError(
                f"{self.NAME}: the optimizer holds no anchored parameter; the model's names have changed."
            )
        if decayed:
            say(
                f"{self.NAME}: the optimizer's weight_decay={decayed:g} pulls the same weights towards 0, the anchor "
                "towards the pretrained ones. Set weight_decay=0 unless you want both."
            )

    def after_step(self, optimizer: Optimizer) -> None:
        overflow = getattr(optimizer, "found_inf", None)  # a fused optimizer leaves the step out by itself
        for group in optimizer.param_groups:
            rate: Any = group["lr"] if overflow is None else group["lr"] * (1 - overflow)
            for p in group["params"]:
                name = self._names.get(p)
                if name is None or p.grad is None:  # the optimizer left it alone, too
                    continue
                weight, anchor = local(p), self._anchor_of(name, p)
                share = rate * (self.beta if anchor is None else self.alpha)
                if isinstance(share, torch.Tensor):
                    share = share.to(weight)
                weight.mul_(1 - share) if anchor is None else weight.lerp_(local(anchor), share)

    def _anchor_of(self, name: str, parameter: Any) -> torch.Tensor | None:
        """The anchor where and as the parameter is: moved or sharded the first time, and kept so."""
        anchor = self._anchor.anchors.get(name)
        if anchor is None:
            return None
        if hasattr(parameter, "placements") and not hasattr(anchor, "placements"):
            from torch.distributed.tensor import distribute_tensor

            mesh = parameter.device_mesh
            anchor = distribute_tensor(anchor.to(mesh.device_type), mesh, parameter.placements)
        anchor = self._anchor.anchors[name] = anchor.to(parameter.device, parameter.dtype)
        return anchor

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: whole(anchor) for name, anchor in self._anchor.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._anchor.load_state_dict(state)
