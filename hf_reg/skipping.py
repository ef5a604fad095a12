"""Not computing dropped heads: attention of the kept heads only, and slices of the projections around it.

Under grouped-query attention the unit is a key/value group with all its query heads. The projections are sliced by letting
the *instance dictionary* of a Linear shadow its weight while its forward runs: the parameters, the state dict and the
forward stay what they are, and the gradient of a slice is a full gradient with zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .own_attention import SeamHook


if TYPE_CHECKING:
    from patches.drophead import DropHeadGate


__all__ = ["Projections", "attend_kept", "find_projections", "slice_projections"]

QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"))
OUT = ("o_proj", "out_proj", "o", "out_lin", "c_proj", "dense", "proj")
FUSED = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv")
