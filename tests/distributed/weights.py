"""What test_processes.py launches for patches at weights: gradients on two processes, and what FSDP is told."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from .heads import ROWS, gradients


PATCHES: dict[str, dict[str, Any]] = {"weight_compander": {"learned": True}, "factorized": {"rank": 0.5}}
PENALTIES: dict[str, Any] = {
    "weight_compander": None, "factorized": {"frobenius_decay": {"weight": 0.1, "kind": "factorized"}}
}  # fmt: skip


def found(patch: str, world: int, accumulation: int, **settings: Any) -> dict[str, torch.Tensor]:
    return gradients(
        "classes/bert", ROWS // world // accumulation, accumulation, PENALTIES[patch],
        patches={patch: PATCHES[patch]}, **settings,
    )[0]  # fmt: skip


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    if "--sharded" in sys.argv:
        from .fsdp_on_cpu import FSDP2

        try:
            found("factorized", 2, 1, arguments=dict(FSDP2))
        except ValueError as error:
            (folder / f"refused-{rank}").write_text(str(error))
    else:
        results = {
            (patch, accumulation): found(patch, 2, accumulation) for patch in PATCHES for accumulation in (1, 2)
        }
        if rank == 0:
            torch.save(results, folder / "gradients.pt")
