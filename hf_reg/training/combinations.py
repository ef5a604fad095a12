"""What cannot be combined: refused when a trainer is made, with the remedy in the message."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..base import Patch, Penalty


__all__ = ["refuse_combinations"]


def refuse_combinations(
    args: TrainingArguments,
    patches: Sequence[Patch],
    penalties: Sequence[Penalty],
    brought: Sequence[Penalty],
    optimizers: Any,
    compute_loss_func: Callable[..., Any] | None,
    model: nn.Module | None,
) -> None:
    """Raise `ValueError` for the first combination that would be wrong without a word; `brought` are the penalties
    that come with an adapter, which an optimizer may know already."""
    every = [*penalties, *brought]
    names = ", ".join(penalty.name for penalty in every)
    outputs = [penalty.name for penalty in every if "logits" in penalty.NEEDS]
    parameters = [penalty.name for penalty in every if penalty.ON_PARAMETERS]
    optimizer = optimizers[0] if optimizers else None
    if optimizer is not None and (patches or penalties):
        raise ValueError(
            f"The optimizer ({type(optimizer).__name__}) exists already, so parameters that are prepared, sharded or "
            "added later would escape it. Pass optimizer_cls_and_kwargs=(cls, kwargs), or override create_optimizer."
        )
    if getattr(args, "use_liger_kernel", False) and outputs:
        raise ValueError(
            f"use_liger_kernel=True fuses the cross-entropy and returns no logits, which {', '.join(outputs)} needs. "
            "Set use_liger_kernel=False, or liger_kernel_config={'fused_linear_cross_entropy': False}."
        )
    names_of = ("activation_checkpointing", "gradient_checkpointing")  # since transformers 5.23, and before
    kwargs: dict[str, Any] = next(filter(None, (getattr(args, f"{name}_kwargs", None) for name in names_of)), {})
    modules = model.modules() if model is not None else ()
    checkpointing = any(getattr(args, name, False) for name in names_of) or any(
        getattr(module, "gradient_checkpointing", False) for module in modules
    )
    if checkpointing and kwargs.get("use_reentrant") and parameters:
        raise ValueError(
            f"Reentrant checkpointing marks parameters ready twice when {', '.join(parameters)} uses them outside the "
            "forward (DDP raises, or gradients are lost). Set gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    if checkpointing and kwargs.get("preserve_rng_state", True) is False and patches:
        raise ValueError(
            f"Checkpointing with preserve_rng_state=False draws other masks in the recomputation, so the gradients of "
            f"{', '.join(patch.name for patch in patches)} would be wrong. Leave preserve_rng_state at True."
        )
    if compute_loss_func is not None and every:
        parameters_of = inspect.signature(compute_loss_func).parameters
        if "num_items_in_batch" not in parameters_of:
            raise ValueError(
                f"compute_loss_func does not name num_items_in_batch, so its loss is a mean that Trainer holds to be "
                f"scaled: with {names} beside it the proportion would change with accumulation. Divide its sum by "
                "num_items_in_batch."
            )
    if (patches or every) and args.n_gpu > 1:
        raise ValueError(
            "Several GPUs in one process (torch.nn.DataParallel) give one stream of masks and no parameter gradients "
            "for penalties. Launch one process a GPU: `torchrun --nproc_per_node N` or `accelerate launch`."
        )
