"""What a regularizer has to know about processes: whole parameters where they are sharded, a random stream for each
data-parallel rank, and whether the processes that were asked for are really there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments


__all__ = [
    "GATHER", "check_launch", "data_parallel", "ddp_explained", "loading_whole", "named_scoped_parameters",
    "named_whole_parameters", "seed_rank", "select_parameters", "whole", "wrap_anew",
]  # fmt: skip

GATHER = (
    "A sharded model is saved whole with FSDP's state_dict_type FULL_STATE_DICT, or with DeepSpeed's "
    "stage3_gather_16bit_weights_on_model_save."
)
ADAPTERS = ("*.lora_*", "*.sorsa_*", "*.modules_to_save.*", "*.ia3_*", "*.vera_*", "*.oft_*", "*.hada_*", "*.lokr_*")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """`parameter` with all its rows, differentiable: gathered under FSDP2 (a collective: every rank must call it).

    Raises:
        `ValueError`: for a shard whose other parts cannot be gathered (ZeRO-3, FSDP 1) and on the meta device.
    """
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id") and parameter.numel() == 0:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            return parameter.clone()
    if parameter.is_meta or getattr(parameter, "_is_flat_param", False) or parameter.numel() == 0:
        raise ValueError(
            f"A parameter of shape {tuple(parameter.shape)} on {parameter.device} is a shard or a placeholder, so a "
            "penalty on it would be wrong. Shard with FSDP2 (fsdp_version: 2) or ZeRO-1 / 2 / 3 instead of FSDP 1."
        )
    return parameter


def select_parameters(model: nn.Module, scope: str | Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of `model` in `scope` that take a gradient, as they are held here."""
    patterns: Sequence[str]
    if isinstance(scope, str):
        patterns = {"trainable": ("*",), "all": ("*",), "adapters": ADAPTERS}.get(scope, (scope,))
    else:
        patterns = scope
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(fnmatchcase(name, pattern) for pattern in patterns):
            yield name, parameter


def named_scoped_parameters(model: nn.Module, scope: str | Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """[`select_parameters`], of which there has to be one.

    Raises:
        `ValueError`: if `scope` selects none.
    """
    found = False
    for name, parameter in select_parameters(model, scope):
        found = True
        yield name, parameter
    if not found:
        raise ValueError(
            f"No trainable parameter of {type(model).__name__} is in the scope {scope!r}. Give 'trainable', "
            "'adapters' (of a PeftModel) or glob patterns of parameter names."
        )


def named_whole_parameters(model: nn.Module, scope: str | Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of `model` in `scope` that take a gradient, gathered one at a time, in the same order everywhere.

    Raises:
        `ValueError`: if `scope` selects none.
    """
    for name, parameter in named_scoped_parameters(model, scope):
        yield name, whole(parameter)


def data_parallel(accelerator: Accelerator) -> tuple[int, int]:
    """This process's data-parallel rank, and how many there are: ranks that share a batch count once."""
    config = getattr(accelerator, "parallelism_config", None)
    sharing = getattr(config, "non_data_parallel_size", 1) if config is not None else 1
    return accelerator.process_index // sharing, max(accelerator.num_processes // sharing, 1)


@contextmanager
def loading_whole() -> Iterator[None]:
    """What this process loads meanwhile is whole, and no concern of the others.

    Under ZeRO-3 transformers would shard it as soon as it is made: a process that loads alone would wait forever.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def wrap_anew(accelerator: Accelerator, model: nn.Module, wrapped: nn.Module) -> None:
    """Before training: let a bare model be wrapped by DDP, although it was evaluated.

    An evaluation marks it as prepared, and `Trainer` (5.23) would then train each process by itself, without a word.
    """
    if accelerator.distributed_type.value.startswith("MULTI_") and wrapped is model:
        model.__dict__.pop("_is_accelerate_prepared", None)


def seed_rank(seed: int, rank: int) -> None:
    """Give data-parallel rank `rank` a random stream of its own: same everywhere, its dropout masks would repeat.

    Rank 0 goes on with the stream that it has, so that one process computes what it would without this call.
    """
    if rank > 0:
        digest = hashlib.sha256(f"hf_reg {seed} {rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # of every device; masks come from nowhere else


@contextmanager
def ddp_explained(on_parameters: bool) -> Iterator[None]:
    """Say what DDP's error about a parameter that is ready twice means where there are penalties on parameters."""
    try:
        yield
    except RuntimeError as error:
        if "ready only once" not in str(error) or not on_parameters:
            raise
        raise RuntimeError(
            "DDP took a parameter for unused that a penalty uses although the forward does not. Narrow the "
            "penalty's scope, or set ddp_find_unused_parameters=False if it covers all such parameters."
        ) from error


def check_launch(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuse a launch that silently became something else than it was asked to be.

    Raises:
        `RuntimeError`: several processes that each train alone, one process where several were asked for, or FSDP or
        DeepSpeed that was asked for and is not on.
    """
    asked = int(os.environ.get("WORLD_SIZE", args.world_size))
    if asked != args.world_size:
        raise RuntimeError(
            f"The launcher started {asked} processes, but this one trains alone (world size {args.world_size}): each "
            "would train the whole data and write to the same folder. On CPUs set ACCELERATE_USE_CPU=true or "
            "TrainingArguments(use_cpu=True)."
        )
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    told = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & set(os.environ)
    if on_cpu and "MASTER_ADDR" in os.environ and not told:
        raise RuntimeError(
            "accelerate was asked for several processes on CPUs, but `--cpu` (MULTI_CPU) starts one without MPI. "
            "Launch with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...` or torchrun."
        )
    kind = accelerator.distributed_type.value
    fsdp = bool(getattr(args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    deepspeed = bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    for name, wanted in (("FSDP", fsdp), ("DEEPSPEED", deepspeed)):
        if wanted and kind != name and args.world_size > 1:
            raise RuntimeError(
                f"{name} was asked for, but this run is {kind}: every process would hold the whole model. accelerate "
                f"leaves {name} out when ACCELERATE_USE_CPU is set; unset it, or leave {name} out."
            )
