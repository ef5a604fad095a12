"""What identifies a model, a data set and an example: digests of their contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from .teacher import Teacher


__all__ = ["data_fingerprint", "example_hashes", "model_fingerprint", "teacher_fingerprint", "together"]

IGNORED = ("_name_or_path", "transformers_version", "use_cache", "hf_reg")  # of a configuration
IGNORED_BY_PEFT = ("base_model_name_or_path", "inference_mode", "revision")
WRAPPED = (".base_layer", ".original_module")  # what PEFT adds to the names of weights below an adapter


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _of_adapter(model: Any) -> tuple[str, str]:
    """What the names of an adapter's own weights contain."""
    return getattr(getattr(model, "base_model", None), "prefix", "lora_"), "modules_to_save."


def _settings(config: dict[str, Any], ignored: Sequence[str]) -> bytes:
    kept = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.dumps({k: v for k, v in kept.items() if k not in ignored}, sort_keys=True, default=str).encode()


def model_fingerprint(model: Any, below_adapter: bool = False) -> str:
    """Digest of configuration and weights of a model; the weights are read one after the other and never copied whole.

    Args:
        model (`nn.Module`): with its weights on this process, not sharded.
        below_adapter (`bool`, *optional*, defaults to `False`):
            Leave a `PeftModel`'s adapter out: the digest is that of the model before the adapter was added.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    digest = hashlib.sha256(type(base).__name__.encode())
    if hasattr(base, "config"):
        digest.update(_settings(base.config.to_diff_dict(), IGNORED))
    weights, own = (base.state_dict(), _of_adapter(model)) if below_adapter else (model.state_dict(), ())
    for name, config in {} if below_adapter else sorted(getattr(model, "peft_config", {}).items()):
        digest.update(name.encode() + _settings(config.to_dict(), IGNORED_BY_PEFT))
    named = {reduce(lambda text, part: text.replace(part, ""), WRAPPED, name): name for name in weights}
    for name, key in sorted(named.items()):
        if not any(part in key for part in own):
            digest.update(f"{name} {weights[key].dtype} {tuple(weights[key].shape)}".encode())
            digest.update(_bytes(weights[key]))
    return digest.hexdigest()


def teacher_fingerprint(teacher: Teacher) -> str:
    """Digest of configuration and weights of the teacher: of a model of its own, or of the base under the adapter.

    Raises:
        `ValueError`: if a parameter is trained that is not the adapter's: then the teacher changes with it.
    """
    if teacher.other is not None:
        return model_fingerprint(teacher.other)
    own = _of_adapter(teacher.model)
    trained = [
        name for name, parameter in teacher.model.named_parameters()
        if parameter.requires_grad and not any(part in name for part in own)
    ]  # fmt: skip
    if trained:
        raise ValueError(
            f"teacher_cache: {trained[0]} and {len(trained) - 1} more parameters are trained and belong to the "
            "teacher, which therefore changes. Freeze them, pass teacher=, or leave teacher_cache out."
        )
    return model_fingerprint(teacher.model, below_adapter=True)


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
