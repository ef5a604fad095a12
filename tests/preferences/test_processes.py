"""Two processes make the step, the logs and the evaluation of one; checkpointing on and off (R16)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..distributed.launch import launch
from .processes import CASES, SHARDED, step


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["--ddp", "--fsdp2"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    launch("tests.preferences.processes", str(tmp_path), kind)
    found = torch.load(tmp_path / "steps.pt")
    assert set(found) == set([*SHARDED, "start"] if kind == "--fsdp2" else [*CASES, "budget"])
    for case, (moved, logged, evaluated) in found.items():
        trained, variant = {"budget": ("lora", "cumulative"), "start": ("start", "cumulative")}.get(case, case[:2])
        whole, log, first = step(tmp_path, trained, variant, 1, False)
        assert whole.keys() == moved.keys() and any(value.any() for value in moved.values())
        for name, value in whole.items():
            torch.testing.assert_close(moved[name], value, rtol=1e-4, atol=1e-7, msg=f"{case} {name}")
        assert logged == pytest.approx(log, rel=1e-4, abs=1e-6), case
        assert evaluated == pytest.approx(first, rel=1e-4, abs=1e-6), case
