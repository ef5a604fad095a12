"""Saving over an earlier checkpoint: a process that is killed before the end leaves the earlier one whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_reg import RegularizedTrainer, SorsaConfig, get_regularized_peft_model
from hf_reg.files import staging

from ..adapters.models import build, logits, train
from ..adapters.test_storage import batches
from .test_block import arguments


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tests.adapters.models import build
from tests.checkpoints.test_saving import trainer_of

model = build()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1)
folder, moment = Path(sys.argv[1]), sys.argv[2]
save = torch.save
def killed(*args, **kwargs):  # the arguments are what a trainer writes last
    os.kill(os.getpid(), signal.SIGKILL)
import safetensors.torch, transformers.modeling_utils as modeling
if moment == "weights":
    def torn(tensors, file, **kwargs):
        Path(file).write_bytes(b"torn")
        killed()
    modeling.safe_save_file = torn
else:
    torch.save = killed
trainer_of(model, folder).save_model(str(folder))
"""


def trainer_of(model: Any, folder: Path) -> RegularizedTrainer:
    return RegularizedTrainer(model=model, args=arguments(folder), train_dataset=batches(), penalties="l1")


@pytest.mark.parametrize("moment", ["weights", "end"])
def test_a_killed_save_leaves_the_earlier_checkpoint(moment: str, tmp_path: Path) -> None:
    model = build()
    trainer_of(model, tmp_path).save_model(str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), moment], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2], env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before
    left = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1 and left[0].startswith("_saving-")  # the kill was in the middle
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(build(), tmp_path)
    trainer.save_model(str(tmp_path / "a"))
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model(str(tmp_path / "a"))
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_other_files_stay_and_left_over_weights_go(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "README.md").write_text("mine\n")
    (tmp_path / "checkpoint-1").mkdir()
    train(model)
    trainer_of(model, tmp_path).save_model(str(tmp_path))
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "README.md").read_text() == "mine\n" and (tmp_path / "checkpoint-1").is_dir()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_adapters_are_moved_with_their_folders(tmp_path: Path) -> None:
    model = get_regularized_peft_model(build(), SorsaConfig(r=2, task_type="CAUSAL_LM"))
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    trainer_of(model, tmp_path).save_model(str(tmp_path))
    assert {"hf_reg.json", "hf_reg.safetensors", "adapter_model.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    assert list(json.loads((tmp_path / "second" / "hf_reg.json").read_text())["hf_reg"]["penalties"]) == ["l1"]
    assert not list(tmp_path.glob("_saving-*"))
    plain = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    trainer = RegularizedTrainer(model=plain, args=arguments(tmp_path), train_dataset=batches())
    trainer.save_model(str(tmp_path))  # over the SVD adapter: its factors must not be taken for this one's
    assert not (tmp_path / "hf_reg.json").exists() and not (tmp_path / "hf_reg.safetensors").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(build(), str(tmp_path))), logits(plain))
    assert "license: mit" in (tmp_path / "README.md").read_text() and "mine" in (tmp_path / "README.md").read_text()


def test_staging_makes_the_folder(tmp_path: Path) -> None:
    with staging(tmp_path / "a" / "b") as folder:
        (folder / "c").mkdir()
        (folder / "c" / "d").write_text("e")
        assert not (tmp_path / "a" / "b" / "c").exists()
    assert (tmp_path / "a" / "b" / "c" / "d").read_text() == "e" and len(list((tmp_path / "a" / "b").iterdir())) == 1


def test_a_run_goes_on_from_the_last_whole_checkpoint(tmp_path: Path) -> None:
    """A checkpoint is whole when its `trainer_state.json` is, which `Trainer` writes last, and not at once."""

    def trainer() -> RegularizedTrainer:
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, logging_steps=1)
        return RegularizedTrainer(model=build(), args=args, train_dataset=batches(), penalties="l1")

    trainer().train()
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    for text in (None, "", '{"epo'):  # killed before it, and while it was written
        state.unlink(missing_ok=True)
        if text is not None:
            state.write_text(text)
        made = trainer()
        made.train(resume_from_checkpoint=True)
        assert len([entry for entry in made.state.log_history if "loss" in entry]) == 4
        assert json.loads(state.read_text())["global_step"] == 4
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-nine")
    (tmp_path / "checkpoint-9").mkdir()
    made = trainer()
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 4
