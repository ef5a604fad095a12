"""Tests only: make accelerate take its FSDP2 path on gloo. Import it before anything that makes an `Accelerator`.

accelerate looks at its FSDP plugin for GPU-like types alone; on CPUs it trains DDP without a word, which
`hf_reg.distributed.check_launch` refuses. Private names of accelerate: a new release may need a new shim.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed
from accelerate.state import PartialState
from accelerate.utils import DistributedType


os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def _prepare_backend(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str | None, DistributedType]:
    if int(os.environ.get("LOCAL_RANK", "-1")) == -1:
        return None, DistributedType.NO
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


PartialState._prepare_backend = _prepare_backend

FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "state_dict_type": "FULL_STATE_DICT",
    },
}
