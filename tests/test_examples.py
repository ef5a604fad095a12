"""The example scripts run as their docstrings say, and as `accelerate launch` starts them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from .distributed.launch import ROOT, environment, run


SCRIPTS = ("finetune_classification", "finetune_causal_lm")


@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke(tmp_path: Path, name: str) -> None:
    import subprocess

    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--smoke", "--use_cpu", "--output_dir"]
    chosen = ["--patches", "{drophead: {p: 0.1, schedule: v_shape}}", "--penalties", "confidence: 0.01"]
    done = subprocess.run(
        [*command, str(tmp_path), *chosen], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss_confidence" in done.stdout and "eval_loss" in done.stdout
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in ("bert", "llama")
    assert "hf_reg" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_data_it_says_what_is_missing(tmp_path: Path, name: str) -> None:
    import subprocess

    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--output_dir", str(tmp_path)],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "Give --train FILE" in done.stderr


@pytest.mark.slow
def test_accelerate_launch_of_the_configuration(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "finetune_classification.py")
    config = ["--config_file", str(ROOT / "examples" / "accelerate" / "ddp.yaml")]
    done = run(
        ["accelerate.commands.launch", *config, script, "--smoke", "--use_cpu", "--output_dir", str(tmp_path)],
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rate = re.search(r"train_samples_per_second", done.stdout)
    assert rate and (tmp_path / "model.safetensors").is_file()


def test_configurations_are_what_they_are_called() -> None:
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED", "multi_node": "MULTI_GPU"}
    for name, kind in kinds.items():
        config = yaml.safe_load((ROOT / "examples" / "accelerate" / f"{name}.yaml").read_text())
        assert config["distributed_type"] == kind and config["num_processes"] >= config["num_machines"]
    assert yaml.safe_load((ROOT / "examples/accelerate/fsdp2.yaml").read_text())["fsdp_config"]["fsdp_version"] == 2
