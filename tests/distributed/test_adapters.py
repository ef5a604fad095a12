"""SORSA and BA-LoRA on two processes, with DDP, FSDP2 and ZeRO-3: the losses and the saved adapter of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .adapters import ADAPTERS, run
from .launch import launch


KINDS = ["--ddp", "--fsdp2", pytest.param("--zero3", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_the_adapter_of_one(tmp_path: Path, kind: str) -> None:
    if kind == "--zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")
    two = tmp_path / "two"
    two.mkdir()
    launch("tests.distributed.adapters", str(two), kind)
    losses = json.loads((two / "losses.json").read_text())
    assert set(losses) == (set(ADAPTERS) if kind != "--zero3" else {"coupled", "ba_lora"})
    for name in losses:
        wanted = run(name, tmp_path / "one", 1)
        assert losses[name] == pytest.approx(wanted, rel=1e-5), name
        one, other = (load_file(where / name / "hf_reg.safetensors") for where in (tmp_path / "one", two))
        assert one.keys() == other.keys()
        torch.testing.assert_close(other, one, atol=2e-6, rtol=1e-5)
        plain = [load_file(where / name / "adapter_model.safetensors") for where in (tmp_path / "one", two)]
        torch.testing.assert_close(plain[1], plain[0], atol=2e-6, rtol=1e-5)
