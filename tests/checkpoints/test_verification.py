"""verify_checkpoint: sound folders pass, each fault is named, and a hostile folder is never loaded."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_reg import SorsaConfig, get_regularized_peft_model, patch_model, verify_checkpoint
from hf_reg.checkpoints import verification

from ..adapters.models import build, train
from .test_loading import Bomb, change


def found(report: Any) -> dict[str, bool | None]:
    return {check.name: check.passed for check in report.checks}


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_sound_checkpoints_pass(family: str, tmp_path: Path) -> None:
    model = patch_model(train(build(family), family), "drophead").train()
    model.save_pretrained(tmp_path)
    report = verify_checkpoint(tmp_path, model=model if family in ("bert", "t5") else None)
    assert report.passed and report.problems == [] and report.relative < 1e-6, report
    assert model.training
    names = {"files", "layout", "recipe", "load", "keys", "dtype", "tied weights", "finite weights", "logits"}
    assert found(report) == {name: True for name in names} | {"card": None}
    assert json.loads(json.dumps(report.as_dict()))["largest_logit_difference"] == report.largest
    assert "sound" in str(report) and "hf_reg 0.1.0: drophead" in str(report)


@pytest.mark.parametrize("kind", ["plain", "sorsa"])
def test_adapters_pass(kind: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if kind == "plain":
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        model = get_regularized_peft_model(base, SorsaConfig(r=2, task_type="CAUSAL_LM"))
    train(model).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").unlink()
    report = verify_checkpoint(tmp_path / "a", model=model)
    assert report.passed and report.relative < 1e-5, report
    (tmp_path / "base").rename(tmp_path / "moved")
    gone = verify_checkpoint(tmp_path / "a")
    assert len(gone.problems) == 1 and "The base of the adapter cannot be used" in gone.problems[0]
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    tensors["base_model.model.x.lora_A.weight"] = tensors.popitem()[1]
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    report = verify_checkpoint(tmp_path / "a", model=model, base=tmp_path / "moved")
    assert any(line.startswith("keys: missing base_model") for line in report.problems), report


def faulty(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] = float("nan")


def missing(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.stray.weight"] = tensors.pop("lm_head.weight")


def moved(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] *= 1.01


def halved(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].half()


@pytest.mark.parametrize(
    ("fault", "texts"),
    [
        (infinite, ["finite weights: model.norm.weight is not finite", "logits: "]),
        (missing, ["keys: missing lm_head.weight; unexpected model.stray.weight", "logits: "]),
        (moved, ["logits: largest difference from the live model"]),
        (halved, ["dtype: the configuration says float32, stored are F16", "logits: "]),
    ],
)
def test_faulty_weights_are_named(fault: Any, texts: list[str], tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    faulty(tmp_path, fault)
    report = verify_checkpoint(tmp_path, model=model)
    assert not report.passed and len(report.problems) == len(texts), report
    for line, text in zip(report.problems, texts, strict=True):
        assert line.startswith(text)


def test_tied_weights(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    report = verify_checkpoint(tmp_path, model=model)
    assert report.passed and "lm_head.weight" in str(report), report

    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    faulty(tmp_path, untie)
    assert "tied weights: lm_head.weight is no longer tied" in verify_checkpoint(tmp_path).problems


def hostile(folder: Path) -> dict[str, Callable[[], Any]]:
    code = json.dumps({"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}})
    return {
        "pickle": lambda: (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "exploded"))),
        "script": lambda: (folder / "run.sh").write_text("touch exploded"),
        "mode": lambda: (folder / "config.json").chmod(0o755),
        "link": lambda: (folder / "notes.txt").symlink_to("/etc/hostname"),
        "dangling": lambda: (folder / "notes.txt").symlink_to("nowhere"),
        "recipe": lambda: change(folder / "config.json", hf_reg={"patches": {"os.system": {}}}),
        "remote code": lambda: (folder / "config.json").write_text(code),
        "traversal": lambda: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        ),
        "truncated": lambda: os.truncate(folder / "model.safetensors", 100),
        "no configuration": lambda: (folder / "config.json").write_text("{"),
    }


TEXTS = {
    "pickle": r"files: pytorch_model.bin is a pickle",
    "script": "files: run.sh is executable",
    "mode": "files: config.json is executable",
    "link": "files: notes.txt is a link out of the folder",
    "dangling": "files: notes.txt is no file",
    "recipe": "recipe: ValueError: The hf_reg block cannot be used",
    "remote code": "load: ",
    "traversal": "layout: ValueError: ",
    "truncated": "layout: ",
    "no configuration": "layout: ValueError: ",
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_folders_are_problems_and_never_errors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("bert").save_pretrained(tmp_path)
    if name in ("pickle", "script", "mode", "link", "dangling", "recipe"):  # loading them is of no interest
        monkeypatch.setattr(verification, "_in_a_new_process", lambda *args: 1 / 0)
    hostile(tmp_path)[name]()
    report = verify_checkpoint(tmp_path)
    assert not report.passed and any(line.startswith(TEXTS[name]) for line in report.problems), report
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("token", [None, "hf_alice", "hf_" + "a" * 34])
def test_training_arguments_are_searched_for_a_token(token: str | None, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, hub_token=token)
    torch.save(args, tmp_path / "training_args.bin")
    problems = verification.find_problems(tmp_path)
    assert bool(problems) == (token is not None)
    assert all("training_args.bin holds a token" in line for line in problems)


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder. Give the one that save_pretrained"):
        verify_checkpoint(tmp_path / "nowhere")
    report = verify_checkpoint(tmp_path)
    assert "holds neither config.json nor adapter_config.json" in report.problems[0]
