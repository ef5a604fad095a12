"""What stands around the step of an optimizer, in a loop of one's own and in any `Trainer` alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback


__all__ = ["Companion", "local"]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor, which shares its memory; another tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Companion(TrainerCallback):
    """Acts before or after every step of an optimizer, through the hooks that torch has for `Optimizer.step`.

    In a loop: `companion.attach(optimizer, model)`. In a [`~transformers.Trainer`]: `callbacks=[companion]`, or with
    [`~hf_reg.RegularizedTrainer`] by name: `companions="perp_grad"`. The hooks run where the optimizer itself does:
    with averaged, unscaled and clipped gradients, once for all micro-batches, and not where fp16 overflow or
    `on_nonfinite="skip"` leaves a step out. FSDP2, DDP and several parameter groups are fine.

    Subclass it to add one: override `before_step` or `after_step`.
    """

    NAME: ClassVar[str] = ""
    FORMULA: ClassVar[str] = ""

    def prepare(self, model: nn.Module) -> None:
        """Called with the unwrapped model as it is before training, and before a checkpoint is loaded into it."""

    def bind(self, optimizer: Optimizer, model: nn.Module | None) -> None:
        """Called by `attach`: the place to look at the parameters that the optimizer holds."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Called when gradients are complete."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called when the weights have moved; the gradients are still there."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs, as plain tensors; under FSDP2 every process must call it."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state_dict` gave."""

    def attach(self, optimizer: Optimizer, model: nn.Module | None = None) -> Companion:
        """Act around the steps of `optimizer` from now on, and around those of no other.

        Args:
            optimizer ([`~torch.optim.Optimizer`]): bare or as accelerate prepared it, with the final parameters: after
                `fully_shard` or `accelerator.prepare`.
            model (`nn.Module`, *optional*): whose parameters it holds; a companion that knows names needs it.

        Returns:
            [`Companion`]: itself.

        Raises:
            `ValueError`: under DeepSpeed and FSDP 1, whose optimizers hold flat parts of the parameters.
            `TypeError`: for something that is no optimizer.
        """
        while True:
            if any("deepspeed" in f"{cls.__module__}.{cls.__name__}".lower() for cls in type(optimizer).__mro__):
                raise ValueError(
                    f"{self.NAME}: DeepSpeed's optimizer holds flat parts of the parameters. Use DDP or FSDP2."
                )
            if not hasattr(optimizer, "optimizer"):
                break
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{self.NAME}: expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        modules = [] if model is None else list(model.modules())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(type(one).__name__ == "FullyShardedDataParallel" for one in modules) or any(
            getattr(p, "_is_flat_param", False) for p in parameters
        ):
            raise ValueError(f"{self.NAME}: FSDP 1 flattens the parameters. Use FSDP2 (fsdp_version: 2) or DDP.")
        self.detach()
        self.bind(optimizer, model)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)
        ]  # fmt: skip
        return self

    def detach(self) -> None:
        """Leave the optimizer alone again."""
        for handle in getattr(self, "_handles", ()):
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if any(one is not None for one in (*args[1:], kwargs.get("closure"))):  # the first one is the optimizer
            raise ValueError(
                f"{self.NAME}: {type(optimizer).__name__}.step(closure) computes gradients of its own, which the "
                "companion would not see. Compute them before, and call step()."
            )
        self.before_step(optimizer)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self.after_step(optimizer)

    # of a Trainer

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        name = str(getattr(args.optim, "value", args.optim))
        if "layerwise" in name or "lomo" in name:
            raise ValueError(
                f"{self.NAME}: optim={name!r} updates each weight within the backward pass, so there is no step to "
                "act around. Choose another optimizer, such as 'adamw_torch'."
            )
        if getattr(args, "deepspeed", None):
            raise ValueError(f"{self.NAME}: DeepSpeed holds flat parts of the parameters. Use DDP or FSDP2.")
        self.prepare(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.attach(kwargs["optimizer"], extract_model_from_parallel(model, keep_torch_compile=False))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()
