"""The reference's log-probs of whole data sets, computed once before training, and kept on disk for other runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..files import replacing
from ..training.fingerprints import model_fingerprint, together
from .data import REFERENCE, TOKENS, PreferencePairs
from .reference import Reference
from .tokens import cut


__all__ = ["check_precomputing", "precompute_reference"]


def check_precomputing(args: Any, stored: bool, collator: Any) -> None:
    """Raise `ValueError` for what stands against `args.precompute_reference`; nothing is computed for it."""
    if stored:
        raise ValueError(
            f"Two references: precompute_reference=True and the columns {' and '.join(REFERENCE)}. Leave one of them "
            "out."
        )
    if collator is not None:
        raise ValueError(
            f"precompute_reference computes the log-probs of pairs as PreferenceCollator cuts them, but data_collator "
            f"is {type(collator).__name__}, which may make others of them. Leave one of the two out."
        )
    if args.reference_cache is not None:
        try:
            Path(args.reference_cache).mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=args.reference_cache):
                pass
        except OSError as error:
            raise ValueError(
                f"reference_cache={args.reference_cache!r} is no folder that can be written to ({error}). Give "
                "another one."
            ) from error


def precompute_reference(trainer: Any, data: Mapping[str, PreferencePairs]) -> None:
    """Put the reference's log-probs into the pairs, as the columns `ref_chosen_logps` and `ref_rejected_logps`.

    Batches, the longest pairs first, are dealt out to the processes, in the sizes of training and evaluation. They are
    computed as in a step: in eval mode, and under autocast where the policy itself is the reference.

    Args:
        trainer ([`PreferenceTrainer`]): its model is whole and not wrapped yet; its reference is kept afterwards.
        data (`dict` of `str` to [`PreferencePairs`]): by name; the pairs are changed.

    Raises:
        `ValueError`: for a model that is sharded or differs between processes, a file of the cache that cannot be read
        or does not fit, and log-probs that are not finite.
    """
    reference, accelerator, folder = trainer.reference, trainer.accelerator, trainer.args.reference_cache
    model, own = _check_whole(reference), reference.other is None
    identity = ""
    if folder is not None or accelerator.num_processes > 1:
        identity = model_fingerprint(model, below_adapter=own and hasattr(model, "disable_adapter"))
    precision = accelerator.mixed_precision if own else "no"
    read = computed = 0
    for name, pairs in data.items():
        hashes = _hashes(pairs)
        key = together([identity, precision, hashlib.sha256(hashes.numpy().tobytes()).hexdigest()])
        _check_processes(accelerator, key, name)
        path = None if folder is None else Path(folder, f"{key}.safetensors")
        table = None if path is None else _of_main_process(accelerator, _read, path, hashes)
        if table is None:
            table = _compute(trainer, pairs, name)
            _check_finite(table, pairs, name)
            computed += len(pairs)
            if path is not None and accelerator.is_main_process:
                _write(path, table, hashes, str(reference))
        else:
            read += len(pairs)
        for pair, row in zip(pairs, table.tolist(), strict=True):
            pair.update(zip(REFERENCE, row, strict=True))
    counted = f"{computed} pairs" if folder is None else f"cache {folder}: {read} pairs read, {computed} computed"
    reference.keep(counted)


def _check_whole(reference: Reference) -> nn.Module:
    """The model that computes, if each process has all its weights."""
    model = reference.model if reference.other is None else reference.other
    for name, parameter in model.named_parameters():
        if parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor"):
            raise ValueError(
                f"precompute_reference: {name} of {type(model).__name__} is a shard or a placeholder, but before "
                "training each process computes by itself, with the whole model. Load it whole (not under ZeRO-3, "
                "tensor parallelism or offloading), or leave precompute_reference out."
            )
    return model


def _check_processes(accelerator: Accelerator, key: str, name: str) -> None:
    if len(found := set(gather_object([key]))) > 1:
        raise ValueError(
            f"precompute_reference: {accelerator.num_processes} processes have {len(found)} different references or "
            f"{name}. Load the same weights in each (under FSDP with cpu_ram_efficient_loading=False) and give each "
            "the same rows."
        )


def _of_main_process(accelerator: Accelerator, read: Callable[..., Any], *arguments: Any) -> Any:
    """What `read(*arguments)` returns or raises in the main process, in every process."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [read(*arguments)]
        except ValueError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    return outcome[0]


# computing


def _rows(pair: Mapping[str, Any], pairs: PreferencePairs) -> list[Any]:
    """Prompt and chosen answer, prompt and rejected answer, as they are cut."""
    limit, _, mode = pairs.limits
    return [part for name in TOKENS[1:] for part in cut(pair[TOKENS[0]], pair[name], limit, mode)]


def _compute(trainer: Any, pairs: PreferencePairs, name: str) -> torch.Tensor:
    """Log-probs of chosen and rejected answers (N, 2), fp32, the same in every process."""
    reference, args, accelerator = trainer.reference, trainer.args, trainer.accelerator
    size = args.per_device_train_batch_size if name == "train_dataset" else args.per_device_eval_batch_size
    lengths = [sum(map(len, _rows(pair, pairs))) for pair in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__, reverse=True)
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    mine = parts[accelerator.process_index :: accelerator.num_processes]
    hidden = args.disable_tqdm or not accelerator.is_main_process
    table = torch.zeros(len(pairs), len(REFERENCE))
    own = reference.other is None
    with _placed(reference, accelerator.device), accelerator.autocast() if own else nullcontext():
        for part in tqdm(mine, desc=f"log-probs of {name} under the reference", disable=hidden):
            batch = trainer.data_collator([pairs[index] for index in part])
            sums = reference({key: value.to(accelerator.device) for key, value in batch.items()})
            table[part] = sums.float().cpu().view(len(REFERENCE), -1).T
    return accelerator.reduce(table.to(accelerator.device), "sum").cpu()


@contextmanager
def _placed(reference: Reference, device: torch.device) -> Iterator[None]:
    """The policy on `device`, if `Trainer` left it elsewhere (for FSDP, which places it in `train`)."""
    model: Any = reference.model
    home = next(model.parameters()).device
    if reference.other is not None or home == device or getattr(model, "hf_device_map", None) is not None:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def _check_finite(table: torch.Tensor, pairs: PreferencePairs, name: str) -> None:
    wrong = (~torch.isfinite(table).all(1)).nonzero()[:, 0].tolist()
    if wrong:
        chosen, rejected = table[wrong[0]].tolist()
        more = f" ({len(wrong) - 1} more rows like it)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{name}, row {pairs.row_numbers[wrong[0]]}{more}: the reference's log-probs are {chosen} (chosen) and "
            f"{rejected} (rejected); expected finite ones. Look for weights that are not finite; in fp16, try bf16 or "
            "fp32."
        )


# on disk


def _hashes(pairs: PreferencePairs) -> torch.Tensor:
    """A number for the token ids of each pair (N,), int64."""
    found = bytearray()
    for pair in pairs:
        digest = hashlib.blake2b(digest_size=8)
        for part in _rows(pair, pairs):
            digest.update(len(part).to_bytes(8, "little") + np.asarray(part, dtype=np.int32).tobytes())
        found += digest.digest()
    return torch.frombuffer(found, dtype=torch.int64)


def _read(path: Path, hashes: torch.Tensor) -> torch.Tensor | None:
    """What [`_write`] wrote; `None` if there is no such file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            table = torch.stack([file.get_tensor(name) for name in REFERENCE], dim=1)
            known = file.get_tensor("pairs")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"reference_cache: {path} cannot be read ({error}). Delete this file.") from error
    if not torch.equal(known, hashes) or len(table) != len(hashes) or not torch.isfinite(table).all():
        raise ValueError(
            f"reference_cache: {path} holds {len(table)} log-probs that do not belong to the {len(hashes)} pairs that "
            "its name stands for. Delete this file."
        )
    return table


def _write(path: Path, table: torch.Tensor, hashes: torch.Tensor, reference: str) -> None:
    from hf_reg import __version__

    columns = {name: column.contiguous() for name, column in zip(REFERENCE, table.unbind(1), strict=True)}
    about = {"reference": reference, "pairs": str(len(hashes)), "hf_reg_version": __version__}
    with replacing(path) as unfinished:
        save_file({**columns, "pairs": hashes}, unfinished, metadata=about)
