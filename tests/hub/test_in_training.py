"""`push_to_hub=True`: what a trainer pushes while it trains is a checkpoint like any other, without a token in it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, patch_model

from ..adapters import models
from .conftest import TOKEN
from .server import HubServer


REPO = "alice/in-training"


def trainer(folder: Path, **settings: Any) -> RegularizedTrainer:
    arguments = RegularizedTrainingArguments(
        str(folder), push_to_hub=True, hub_model_id=REPO, hub_token=TOKEN, max_steps=2, save_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, per_device_train_batch_size=1, **settings,
    )  # fmt: skip
    batch = models.inputs("bert")
    rows = [{key: value[i] for key, value in batch.items()} for i in range(3)]
    return RegularizedTrainer(model=models.build("bert"), args=arguments, train_dataset=rows, patches="tlm")


def test_every_save(hub: HubServer, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run")
    made.train()
    commits = list(hub.repositories[REPO].commits.values())
    assert len(commits) == 3  # the first, and one a step
    assert len({files["model.safetensors"] for files in commits[1:]}) == 2
    for files in commits:
        assert not any(name.endswith((".bin", ".pt", ".pth")) for name in files)
    for request in hub.requests:
        assert TOKEN.encode() not in request.path.encode() + request.body
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert made.args.hub_token == TOKEN


def test_the_end(hub: HubServer, tmp_path: Path) -> None:
    trainer(tmp_path / "run", hub_strategy="end").train()
    assert len(hub.repositories[REPO].commits) == 1


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_pickles_are_refused_before_anything_is_made(hub: HubServer, tmp_path: Path, strategy: str) -> None:
    with pytest.raises(ValueError, match=rf"hub_strategy='{strategy}'.*'every_save'"):
        trainer(tmp_path / "run", hub_strategy=strategy)
    assert REPO not in hub.repositories


def test_a_hub_that_is_out_of_order_does_not_end_the_training(
    hub: HubServer, tmp_path: Path, pauses: list[float], caplog: Any
) -> None:
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING, "transformers")
    made = trainer(tmp_path / "run")
    hub.fail("POST", "/commit/", 500, times=5)  # all tries of the first push
    made.train()
    assert made.state.global_step == 2 and (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()
    assert "Step 1" in caplog.text and "500" in caplog.text
    assert len(hub.repositories[REPO].commits) == 2  # the second push arrived


def test_save_pretrained_of_a_patched_model_pushes_under_its_folder_s_name(hub: HubServer, tmp_path: Path) -> None:
    model = patch_model(models.build("bert"), "tlm")
    model.save_pretrained(tmp_path / "tiny-tlm", push_to_hub=True, token=TOKEN)
    files = list(hub.repositories["alice/tiny-tlm"].commits.values())[-1]
    assert files["model.safetensors"] == (tmp_path / "tiny-tlm" / "model.safetensors").read_bytes()
    assert "config.json" in files
