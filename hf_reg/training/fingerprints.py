"""What identifies a teacher, a data set and an example: digests of their contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from .teacher import Teacher


__all__ = ["data_fingerprint", "example_hashes", "teacher_fingerprint"]

IGNORED = ("_name_or_path", "transformers_version", "use_cache")  # of a configuration


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def teacher_fingerprint(teacher: Teacher) -> str:
    """Digest of configuration and weights of the teacher: of a model of its own, or of the base under the adapter.

    Raises:
        `ValueError`: if a parameter is trained that is not the adapter's: then the teacher changes with it.
    """
    model: Any = teacher.model if teacher.other is None else teacher.other
    own: tuple[str, ...] = ()
    if teacher.other is None:
        own = (getattr(getattr(model, "base_model", None), "prefix", "lora_"), "modules_to_save.")
        trained = [n for n, p in model.named_parameters() if p.requires_grad and not any(part in n for part in own)]
        if trained:
            raise ValueError(
                f"teacher_cache: {trained[0]} and {len(trained) - 1} more parameters are trained and belong to the "
                "teacher, which therefore changes. Freeze them, pass teacher=, or leave teacher_cache out."
            )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    digest = hashlib.sha256(type(base).__name__.encode())
    if hasattr(base, "config"):
        settings = {key: value for key, value in base.config.to_diff_dict().items() if key not in IGNORED}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(base.state_dict().items()):
        if not any(part in name for part in own):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def data_fingerprint(dataset: Any) -> str:
    """The fingerprint of a data set of the datasets library; of a list, a digest of its rows; else type and length."""
    known = getattr(dataset, "_fingerprint", None)
    rows = getattr(dataset, "rows", dataset)
    digest = hashlib.sha256(str(known or f"{type(rows).__name__} {len(rows)}").encode())
    if known is None and isinstance(rows, (list, tuple)):
        for row in rows:
            for key in sorted(set(row) & {"input_ids", "labels"}):
                digest.update(_bytes(torch.as_tensor(row[key]).long()))
    return digest.hexdigest()


def example_hashes(tokens: torch.Tensor, attended: torch.Tensor | None, counts: torch.Tensor) -> list[int]:
    """A number of 63 bits for each example, from its tokens without padding and the positions that count.

    Args:
        tokens (`torch.LongTensor` of shape `(B, T)`).
        attended (`torch.Tensor` of shape `(B, T)`, *optional*): mask; without it, what follows the last position that
            counts is left out.
        counts (`torch.BoolTensor` of shape `(B, T)`): the positions whose logits are compared.
    """
    tokens, counts = tokens.cpu(), counts.cpu()
    length = tokens.shape[1]
    if attended is None:  # up to the token that the last position predicts
        last = (counts * torch.arange(1, length + 1)).amax(1, keepdim=True)
        attended = torch.arange(length) <= last
    attended = attended.cpu().bool()
    found: list[int] = []
    for ids, kept, counted in zip(tokens, attended, counts, strict=True):
        digest = hashlib.blake2b(_bytes(ids[kept]), digest_size=8)
        digest.update(_bytes(counted[kept]))
        found.append(int.from_bytes(digest.digest(), "little") >> 1)
    return found


def together(parts: Sequence[str]) -> str:
    """One short digest of several."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
