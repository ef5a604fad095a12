"""Which heads stay, and by what their outputs are multiplied: the arithmetic of DropHead."""

from __future__ import annotations

import torch

from ..base import check_choice


__all__ = ["RESCALE", "drop_heads", "head_scales", "keep_heads"]

RESCALE = ("kept", "expectation")


def keep_heads(batch: int, heads: int, p: torch.Tensor | float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw which heads stay, (batch, heads) bool: each is dropped with probability `p`, independently.

    The head with the largest number always stays, so no row is empty: where every head was dropped that is one of
    them, uniformly at random; elsewhere it had been kept anyway.
    """
    noise = torch.rand(batch, heads, device=device)
    return (noise >= p) | (noise == noise.amax(-1, keepdim=True))


def head_scales(keep: torch.Tensor, rescale: str, p: torch.Tensor | float | None) -> torch.Tensor:
    keep = keep.to(torch.float32)
    if rescale == "kept":
        return keep * (keep.shape[-1] / keep.sum(-1, keepdim=True).clamp(min=1))
    if p is None:
        raise ValueError("rescale='expectation' divides by 1 - p; pass p.")
    return keep / (1 - p)


def drop_heads(
    heads: torch.Tensor, keep: torch.Tensor, *, rescale: str = "kept", p: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Zero the heads that are not kept and rescale the others (arXiv 2004.13342, algorithm 1).

    Args:
        heads (`torch.Tensor` of shape `(B, T, H, D)`): the output of each head, before the output projection.
        keep (`torch.BoolTensor` of shape `(B, H)`): the heads that stay.
        rescale (`str`, *optional*, defaults to `"kept"`):
            `"kept"`: times (number of heads) / (number kept), so that the mean over draws is the undropped output
            given that a head stays; `"expectation"`: divided by 1 - p, as in ordinary dropout.
        p (`float`, *optional*): the drop probability, needed for `"expectation"`.

    Raises:
        `ValueError`: for an unknown `rescale`, a missing `p` or shapes that do not fit.
    """
    check_choice("drop_heads", "rescale", rescale, RESCALE)
    if heads.dim() != 4 or keep.shape != (heads.shape[0], heads.shape[2]):
        raise ValueError(f"heads {tuple(heads.shape)}, keep {tuple(keep.shape)}: expected (B, T, H, D) and (B, H).")
    return heads * head_scales(keep, rescale, p).to(heads.dtype)[:, None, :, None]
