"""The principal singular triplets of a weight: what SORSA, PiSSA and BA-LoRA start their adapters from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers.utils import logging

from hf_reg.distributed import whole
from hf_reg.files import replacing

from .triplets import full_precision, krylov, padded, ritz, spectrum


__all__ = ["Factors", "decompose", "decompose_layers"]

VERSION = 2  # of the algorithm: a cached decomposition of another version is not found
EXACT_BELOW = 256  # measured: on shorter sides Krylov steps save nothing,
BLOCKS = 10  # nor on those of fewer blocks
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Factors:
    """The best approximation of rank `r` of a weight: `left @ diag(values) @ right`, in fp32.

    Attributes:
        left (`torch.Tensor` of shape `(out, r)`): left singular vectors, orthonormal columns.
        values (`torch.Tensor` of shape `(r,)`): singular values, the largest first.
        right (`torch.Tensor` of shape `(r, in)`): right singular vectors, orthonormal rows; the entry of largest
            magnitude of each is positive.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def readable(weight: torch.Tensor) -> torch.Tensor:
    """`weight` with all its rows and columns, as it is stored.

    Raises:
        `ValueError`: for a weight that cannot be decomposed: on the meta device, an ungathered shard of ZeRO-3 or
            FSDP 1, empty, not a matrix, integer or quantised.
    """
    found = f"A weight of shape {tuple(weight.shape)}, {weight.dtype} on {weight.device},"
    if weight.is_meta:
        raise ValueError(
            f"{found} has no values yet. Load the weights before the adapter is added: from_pretrained without "
            "low_cpu_mem_usage / init_empty_weights, and get_peft_model with low_cpu_mem_usage=False."
        )
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"{found} is an ungathered shard of ZeRO-3 (whole: {tuple(getattr(weight, 'ds_shape', ()))}). Decompose "
            "it inside `with deepspeed.zero.GatheredParameters([weight]):`, or before deepspeed.initialize."
        )
    if weight.numel() == 0:
        raise ValueError(f"{found} is empty: expected (out, in), both at least 1.")
    quantised = weight.is_quantized or type(weight).__module__.startswith(("torchao", "bitsandbytes"))
    if quantised or weight.dtype not in DTYPES:
        raise ValueError(
            f"{found} is a {type(weight).__name__} of integers or quantised: expected fp32, fp16, bf16 or fp64. Pass "
            "the dequantised weight."
        )
    if weight.dim() != 2:
        raise ValueError(f"{found} is no matrix: expected (out, in). Leave the layer out, or reshape its weight.")
    return whole(weight).detach()


def widened(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """A readable `weight` in fp32, on the accelerator if there is one.

    Raises:
        `ValueError`: if `rank` is out of range or an entry is not finite.
    """
    short = min(weight.shape)
    if not 1 <= rank <= short:
        raise ValueError(
            f"rank {rank} for a weight of shape {tuple(weight.shape)}: expected 1 to {short}. Lower r for this layer."
        )
    device = weight.device
    if device.type == "cpu" and torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type != "mps":  # mps has no QR and no SVD of its own
            device = accelerator
    matrix = weight.to(device, torch.float32)
    finite = torch.isfinite(matrix.sum()) or torch.isfinite(matrix).all()  # a sum is fast, though it can overflow
    if not finite:
        count = int((~torch.isfinite(matrix)).sum())
        raise ValueError(
            f"A weight of shape {tuple(weight.shape)} has {count} entries that are not finite in fp32: expected none. "
            "Load the checkpoint again, or look for the step at which training diverged."
        )
    return matrix


def decompose(
    weight: torch.Tensor, rank: int, *, tolerance: float = 2e-4, seed: int = 0, exact_below: int = EXACT_BELOW
) -> Factors:
    """The principal singular triplets of a weight, in fp32 whatever the weight's dtype, autocast and TF32 say.

    Large matrices go through block Krylov steps until the low-rank matrix is within `tolerance`; matrices with a short
    side up to `exact_below` or 10 (rank + 8), and those that do not converge, through the whole spectrum.
    Same weight, same seed, same bits on one machine; torch's own random stream is not touched.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): fp32, fp16, bf16 or fp64; from the CPU it is moved to the
            accelerator if there is one, and its factors back.
        rank (`int`): the number of triplets, 1 to `min(out, in)`.
        tolerance (`float`, *optional*, defaults to 2e-4): the energy that may be missing, as estimated from what the
            last steps gained: ||A - found||_F^2 <= ||A - A_r||_F^2 + tolerance ||A||_F^2, A_r the best matrix of this
            rank. On a flat spectrum, where many subspaces hold almost the same energy, this takes one of them (random
            2048 x 2048, rank 16: 0.996 of the best energy, overlap 0.88); 1e-9 takes the principal one.
        seed (`int`, *optional*, defaults to 0): of the Krylov start.
        exact_below (`int`, *optional*, defaults to 256): the short side up to which the whole spectrum is computed.

    Returns:
        [`Factors`]: on the weight's device.

    Raises:
        `ValueError`: for a weight without values here (meta, ZeRO-3 or FSDP 1 shard, empty), that is no matrix, is
            quantised or has entries that are not finite, and for a rank or tolerance out of range.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance {tolerance}: expected a positive number such as 2e-4.")
    weight = readable(weight)
    with full_precision(weight):
        matrix = widened(weight, rank)
        wide = matrix.shape[0] < matrix.shape[1]
        tall = matrix.mT if wide else matrix
        large = tall.shape[1] > max(exact_below, BLOCKS * padded(rank))
        basis = krylov(tall, rank, tolerance, seed) if large else None
        left, values, right = ritz(tall, spectrum(tall, rank, tolerance) if basis is None else basis)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
        if wide:
            left, right = right.mT, left.mT
        largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0)
        factors = left * sign.mT, values, right * sign
        return Factors(*(part.to(weight.device).contiguous() for part in factors))


def _digest(*parts: torch.Tensor | str) -> str:
    """Of the dtypes, shapes and bytes of tensors, and of texts."""
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load(path: Path, device: torch.device) -> Factors:
    try:
        with safe_open(path, framework="pt") as file:
            factors = Factors(*(file.get_tensor(name) for name in ("left", "values", "right")))
            intact = (file.metadata() or {}).get("digest") == _digest(*vars(factors).values())
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable cached decomposition ({error}). Delete this file.") from error
    if not intact:
        raise ValueError(f"{path}: the cached decomposition does not match its own checksum. Delete this file.")
    return Factors(*(part.to(device) for part in vars(factors).values()))


def _save(path: Path, factors: Factors) -> None:
    """Complete or not at all, however many processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: part.cpu() for name, part in asdict(factors).items()}
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata={"digest": _digest(*tensors.values())})


def decompose_layers(
    weights: Mapping[str, torch.Tensor | Callable[[], torch.Tensor]],
    ranks: Mapping[str, int],
    *,
    tolerance: float = 2e-4,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = True,
) -> dict[str, Factors]:
    """[`decompose`] for every layer of a model; what a layer gets depends on nothing but its weight, rank and seed.

    Args:
        weights (`Mapping`): layer name to its weight of shape `(out, in)`, or to a function without arguments that
            makes it (a dequantised one, say): called when its turn comes, so that one at a time is held.
        ranks (`Mapping` of `str` to `int`): the rank of each layer of `weights`.
        tolerance, seed: see [`decompose`].
        cache_dir (`str` or `PathLike`, *optional*): folder of safetensors files, found again by the bytes of the
            weight and all settings; made if missing.
        progress (`bool`, *optional*, defaults to `True`): a bar naming the layer; `None` asks transformers' setting.

    Returns:
        `dict[str, Factors]`: in the order of `weights`.

    Raises:
        `ValueError`: if `ranks` and `weights` differ in their layers, a weight is refused (the layer is named) or a
            cached file is damaged (the file is named; it is never recomputed silently).
    """
    if differing := sorted(weights.keys() ^ ranks.keys()):
        raise ValueError(f"weights and ranks must name the same layers; only one of them has {', '.join(differing)}.")
    shown = logging.is_progress_bar_enabled() if progress is None else progress
    found = {}
    with tqdm(weights.items(), desc="decomposing", unit="layer", disable=not shown) as layers:
        for name, source in layers:
            layers.set_postfix_str(name)
            weight = source() if callable(source) else source
            try:
                found[name] = _cached(weight, ranks[name], tolerance, seed, cache_dir)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return found


def _cached(
    weight: torch.Tensor, rank: int, tolerance: float, seed: int, cache_dir: str | os.PathLike[str] | None
) -> Factors:
    if cache_dir is None:
        return decompose(weight, rank, tolerance=tolerance, seed=seed)
    weight = readable(weight)
    path = Path(cache_dir) / f"{_digest(weight, f'{rank} {tolerance!r} {seed} {VERSION}')}.safetensors"
    if path.exists():
        return _load(path, weight.device)
    factors = decompose(weight, rank, tolerance=tolerance, seed=seed)
    _save(path, factors)
    return factors
