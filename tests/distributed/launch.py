"""Processes of this machine, as a user would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def environment(**settings: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **settings}


def run(command: list[str], timeout: int = 300, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], env=environment(**settings), cwd=ROOT, timeout=timeout, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def launch(module: str, *arguments: str, processes: int = 2, options: tuple[str, ...] = (), **settings: str) -> None:
    """`torchrun` with a port of its own; whatever it says is in the error if it fails."""
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *options, "-m"]
    done = run([*command, "tests.distributed.process", module, *arguments], **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
