"""Two processes are one: DDP, and parameters sharded by FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..distributed.launch import launch
from .runs import COMPANIONS, cut, other, run, weights


pytestmark = pytest.mark.distributed
ROUNDING = {"none": 2e-6, "perp_grad": 5e-6, "decoupled_l2_sp": 2e-6, "gradient_dropout": 2e-6}


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_are_one(tmp_path: Path, sharded: bool) -> None:
    launch("tests.optimizers.runs", str(tmp_path), *(["--sharded"] if sharded else []))
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1))
    assert len(first) == 2 * (len(COMPANIONS) - sharded)
    alone = {}
    for what, spec in COMPANIONS.items():
        more = {"teacher": other()} if what == "gradient_dropout" else {}
        alone[what] = weights(run(tmp_path / "alone", companions=spec, max_steps=3, **cut(1), **more))
        assert what == "none" or any((alone[what][n] - p).abs().max() > 1e-4 for n, p in alone["none"].items()), what
    for (what, parts), found in first.items():
        for name, p in found.items():
            assert torch.equal(p, second[what, parts][name]), (what, parts, name)  # ranks agree to the bit
            far = (p - alone[what][name]).abs() > ROUNDING[what]
            # of gradient dropout, an element whose P is within rounding of U may fall on the other side
            assert far.float().mean() <= (1e-3 if what == "gradient_dropout" else 0), (what, parts, name)
