"""Contiguous blocks of tokens: spans of a text, squares of a grid of patches, and which models have such a grid."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn


__all__ = ["keep_spans", "keep_squares", "leading_tokens", "sees_images", "why_no_square"]

EMBEDDINGS = re.compile(r"Embeddings$|PatchEmbed")
TOKENS = ("cls_token", "class_embedding", "class_token", "distillation_token", "register_tokens")


def sees_images(part: nn.Module) -> bool:
    """Whether the sub-model takes images."""
    return "pixel_values" in str(getattr(part, "main_input_name", ""))


def why_no_square(part: nn.Module) -> str | None:
    """Why the tokens of `part` are no square of patches, or None where its configuration says that they are."""
    config: Any = getattr(part, "config", None)
    size, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if size is None or patch is None:
        return "its configuration has no image_size and patch_size"
    for name in ("num_frames", "num_detection_tokens"):
        if getattr(config, name, None):
            return f"its configuration has {name}, so its tokens are not patches of one image only"
    sides = [size] * 2 if isinstance(size, int) else list(size)
    steps = [patch] * 2 if isinstance(patch, int) else list(patch)
    if len(sides) != 2 or len(steps) != 2 or sides[0] // steps[0] != sides[1] // steps[1]:
        return f"image_size={size} in patches of {patch} is no square"
    return None


def leading_tokens(model: nn.Module, path: str) -> int:
    """Class, distillation and register tokens before the patches that the sub-model at `path` sees.

    They are parameters of the embeddings, which may stand outside of a sub-model that is an encoder.
    """
    part = model.get_submodule(path)
    while path and not any(EMBEDDINGS.search(type(module).__name__) for module in part.modules()):
        path = path.rpartition(".")[0]
        part = model.get_submodule(path)
    named = {name.rpartition(".")[2]: parameter for name, parameter in part.named_parameters()}
    return sum(named[name].shape[1] if named[name].dim() == 3 else 1 for name in TOKENS if name in named)


def _covered(begun: torch.Tensor, block: torch.Tensor | int, dim: int) -> torch.Tensor:
    """What the blocks begun along `dim` cover."""
    place = torch.arange(begun.shape[dim], device=begun.device).view([-1] + [1] * (begun.dim() - dim - 1))
    last = torch.where(begun, place, -begun.shape[dim] - 1).cummax(dim).values
    return place - last < block


def keep_spans(coins: torch.Tensor, real: torch.Tensor, block_size: int, rate: torch.Tensor | float) -> torch.Tensor:
    """Which tokens no span covers.

    Args:
        coins (`torch.Tensor` of shape `(B, T, C | 1)`): uniform in [0, 1).
        real (`torch.BoolTensor` of shape `(B, T)`): False at padding.
        block_size (`int`): tokens of a span; an example with fewer is one span.
        rate (`float`): part of the tokens to drop.

    Returns:
        `torch.BoolTensor` of the shape of `coins`.
    """
    length = real.shape[1]
    place = torch.arange(length, device=real.device)
    padding = torch.where(real, length, place).flip(1).cummin(1).values.flip(1)  # the next one from here
    tokens = real.sum(1, keepdim=True)
    block = tokens.clamp(min=1, max=block_size)
    begins = padding - place >= block
    gamma = rate * tokens / (block * begins.sum(1, keepdim=True).clamp(min=1))
    begun = (coins < gamma[..., None]) & begins[..., None]
    return ~_covered(begun, block[..., None], 1)


def keep_squares(coins: torch.Tensor, block_size: int, rate: torch.Tensor | float) -> torch.Tensor:
    """The same for squares of a grid, `coins` and result of shape (B, N, N, C | 1)."""
    side = coins.shape[1]
    block = min(block_size, side)
    begins = torch.arange(side, device=coins.device) <= side - block
    gamma = rate * side**2 / (block**2 * (side - block + 1) ** 2)
    begun = (coins < gamma) & (begins[:, None] & begins)[None, ..., None]
    return ~_covered(_covered(begun, block, 1), block, 2)
