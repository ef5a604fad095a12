"""SORSA and BA-LoRA on two processes, with DDP and with FSDP2: the losses and the saved adapter of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .adapters import ADAPTERS, run
from .launch import launch


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_train_the_adapter_of_one(tmp_path: Path, sharded: bool) -> None:
    two = tmp_path / "two"
    two.mkdir()
    launch("tests.distributed.adapters", str(two), *(["--sharded"] if sharded else []))
    losses = json.loads((two / "losses.json").read_text())
    for name in ADAPTERS:
        wanted = run(name, tmp_path / "one", 1)
        assert losses[name] == pytest.approx(wanted, rel=1e-5), name
        one, other = (load_file(where / name / "hf_reg.safetensors") for where in (tmp_path / "one", two))
        assert one.keys() == other.keys()
        torch.testing.assert_close(other, one, atol=2e-6, rtol=1e-5)
        plain = [load_file(where / name / "adapter_model.safetensors") for where in (tmp_path / "one", two)]
        torch.testing.assert_close(plain[1], plain[0], atol=2e-6, rtol=1e-5)
