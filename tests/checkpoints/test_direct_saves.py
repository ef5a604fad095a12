"""`save_pretrained` called by the user: patched models replace a checkpoint in one step, other models save as ever."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_reg import patch_model, unpatch_model
from hf_reg.checkpoints import saves
from hf_reg.checkpoints.writing import replacing_checkpoint
from hf_reg.files import staging

from ..adapters.models import build, logits


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were saved to in one step."""
    folders: list[Path] = []

    def watch(folder: Path) -> Any:
        folders.append(folder)
        return replacing_checkpoint(folder)

    monkeypatch.setattr(saves, "replacing_checkpoint", watch)
    return folders


def test_only_patched_models_are_staged(staged: list[Path], tmp_path: Path) -> None:
    model = build()
    patch_model(model, "tlm").save_pretrained(tmp_path / "a")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(str(tmp_path / "b"))
    assert staged == [tmp_path / "a", tmp_path / "b"]
    unpatch_model(model).save_pretrained(tmp_path / "c")
    build().save_pretrained(tmp_path / "d")
    assert len(staged) == 2
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in (tmp_path / "d").iterdir()}


def test_what_is_staged_already_is_not_staged_again(staged: list[Path], tmp_path: Path) -> None:
    with staging(tmp_path) as unfinished:
        patch_model(build(), "tlm").save_pretrained(unfinished / "inner")
    assert not staged and (tmp_path / "inner" / "config.json").is_file()


def test_another_process_writes_nothing(staged: list[Path], tmp_path: Path) -> None:
    patch_model(build(), "tlm").save_pretrained(tmp_path / "a", False)
    assert not staged and not list((tmp_path / "a").iterdir())


def test_what_fails_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(build(), "tlm")
    model.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model.config.rms_norm_eps = 0.5
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *_, **__: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="is a file: expected a folder"):
        model.save_pretrained(tmp_path / "config.json")
    with pytest.raises(TypeError, match="save_directory"):
        model.save_pretrained()


def test_a_copy_and_an_unpickled_model_are_staged_too(tmp_path: Path, staged: list[Path]) -> None:
    model = patch_model(build(), "ffn_dropout")
    copy.deepcopy(model).save_pretrained(tmp_path / "a")
    assert staged == [tmp_path / "a"]
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = """
import pickle, sys
from transformers import PreTrainedModel
model = pickle.load(open(sys.argv[1], "rb"))
assert PreTrainedModel.save_pretrained._hf_reg
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pkl")], check=True, cwd=Path(__file__).parents[2]
    )


def test_variants_stand_beside_each_other(tmp_path: Path) -> None:
    model = patch_model(build(), "tlm")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="v1", max_shard_size="20KB")
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "model.safetensors.index.v1.json").exists()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path, variant="v1")
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors", "model.v1.safetensors"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, variant="v1")), logits(model))
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_method_keeps_its_face() -> None:
    patch_model(build(), "tlm")
    assert PreTrainedModel.save_pretrained.__doc__ and PreTrainedModel.save_pretrained.__name__ == "save_pretrained"
    once = PreTrainedModel.save_pretrained
    patch_model(build(), "tlm")
    assert PreTrainedModel.save_pretrained is once
