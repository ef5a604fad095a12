"""Teacher logits that are computed in the first epoch and read from disk in the others, and in other runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..base import Penalty, check_range
from ..files import replacing
from ..penalties import Consistency, TopLogits
from .example_ids import EXAMPLE_IDS
from .fingerprints import data_fingerprint, example_hashes, teacher_fingerprint, together
from .teacher import Teacher
from .teacher_store import TeacherStore, join_rows, split_rows


__all__ = ["TeacherCache", "make_teacher_cache"]


class TeacherCache:
    """The teacher's `top_k` largest logits at every position that counts, by example.

    In a folder of its own for each teacher (configuration and weights), data set, temperature, precision and `top_k`;
    8 * `top_k` + 4 bytes a position. The consistency is then [`truncated_consistency`], in the first epoch too.

    Args:
        folder (`str`): holds a folder for each of these combinations.
        top_k (`int`): how many logits of a position are kept.
        penalties (sequence of [`Penalty`]): exactly one of them needs the teacher, a [`Consistency`].
        precision (`str`): in which the teacher computes, such as `"bf16"`.

    Raises:
        `ValueError`: for other penalties that need the teacher, or none.
    """

    def __init__(self, folder: str, top_k: int, penalties: Sequence[Penalty], precision: str) -> None:
        check_range("teacher_cache", "teacher_cache_top_k", top_k, 1, float("inf"))
        asking = [penalty for penalty in penalties if "teacher" in penalty.NEEDS]
        kept = [penalty for penalty in asking if isinstance(penalty, Consistency) and penalty.form == "kl"]
        if len(asking) != 1 or len(kept) != 1:
            names = ", ".join(penalty.name for penalty in asking) or "none"
            raise ValueError(
                f"teacher_cache keeps what one `consistency` with form='kl' needs, but the penalties that need a "
                f"teacher are: {names}. Leave teacher_cache out, or keep that one only."
            )
        self.folder, self.top_k, self.penalty, self.precision = Path(folder), top_k, kept[0], precision
        self.forget()

    def forget(self) -> None:
        """Open the folder anew, for another model."""
        self.store: TeacherStore | None = None

    def _open(self, teacher: Teacher, dataset: Any) -> TeacherStore:
        if dataset is None:
            raise ValueError("teacher_cache belongs to a data set, but the trainer has none; pass train_dataset.")
        parts = {
            "teacher": teacher_fingerprint(teacher),
            "data": data_fingerprint(dataset),
            "top_k": self.top_k,
            "temperature": self.penalty.temperature,
            "shift": self.penalty.shift,
            "precision": self.precision,
        }
        store = TeacherStore(self.folder / together([f"{key}={value}" for key, value in parts.items()]))
        about = store.folder / "about.json"
        if not about.exists():
            with replacing(about) as unfinished:
                unfinished.write_text(json.dumps(parts, indent=1) + "\n")
        store.refresh()
        return store

    def __call__(
        self,
        inputs: Mapping[str, Any],
        mask: torch.Tensor | None,
        teacher: Teacher,
        dataset: Any,
        compute: Callable[[], TopLogits],
    ) -> TopLogits:
        """The teacher's largest logits for a batch.

        Args:
            inputs (mapping of `str` to `torch.Tensor`): the micro-batch with its example ids.
            mask (`torch.BoolTensor` of shape `(B, T)`, *optional*): positions that count; `None`: one row an example.
            teacher ([`Teacher`]), dataset: what the logits belong to.
            compute (callable): asks the teacher, if an example of the batch is not there yet.

        Raises:
            `ValueError`: for a batch without example ids or tokens, and for an example with other tokens than before.
        """
        tokens, numbers = inputs.get("input_ids"), inputs.get(EXAMPLE_IDS)
        if tokens is None or numbers is None:
            raise ValueError(
                f"teacher_cache needs input_ids and example ids, but the batch holds {sorted(inputs)}. Keep the key "
                f"{EXAMPLE_IDS!r} in the data collator."
            )
        if self.store is None:
            self.store = self._open(teacher, dataset)
        store = self.store
        counted = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        counts = [1] * len(tokens) if mask is None else mask.sum(1).tolist()
        marks = example_hashes(tokens, inputs.get("attention_mask"), counted)
        keys = list(zip(numbers.tolist(), marks, strict=True))
        found = [store.find(*key) for key in keys]
        if None in found:
            store.refresh()  # another process may have come by
            found = [store.find(*key) for key in keys]
        complete = [rows for rows in found if rows is not None]
        if len(complete) == len(found):
            return join_rows(complete, tokens.device)
        rows = compute()
        for key, known, part in zip(keys, found, split_rows(rows, counts), strict=True):
            if known is None:
                store.add(*key, part)
        return rows

    def flush(self) -> None:
        """Write what is not on disk yet."""
        if self.store is not None:
            self.store.flush()


def make_teacher_cache(args: Any, penalties: Sequence[Penalty], accelerator: Accelerator) -> TeacherCache | None:
    """The cache that `args.teacher_cache` names, if any.

    Raises:
        `ValueError`: where a rank cannot ask its teacher alone, and as [`TeacherCache`] does.
    """
    folder = getattr(args, "teacher_cache", None)
    if not folder:
        return None
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"teacher_cache: under {kind} every rank takes part in a forward of the teacher, but with a cache some "
            "would leave it out. Leave teacher_cache out, or train with DDP."
        )
    return TeacherCache(folder, args.teacher_cache_top_k, penalties, accelerator.mixed_precision)
