"""On disk: plain LoRA that stock PEFT loads without hf_reg, and the factors with which training goes on exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, SorsaConfig, get_regularized_peft_model
from hf_reg.adapters import svd

from .models import METHODS, adapted, build, config_of, inputs, logits, train


STOCK = """
import sys
sys.modules["hf_reg"] = None  # an import of it would raise
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
base, folder, kind, out = sys.argv[1:]
cls = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
model = PeftModel.from_pretrained(cls.from_pretrained(base), folder).eval()
batch = torch.load(out + ".in")
with torch.no_grad():
    torch.save(model(**batch).logits, out)
"""


@pytest.mark.parametrize(
    ("method", "family", "settings"),
    [
        ("sorsa", "llama", {}),
        ("sorsa", "gpt2", {"folded": True, "rank_pattern": {"c_fc": 6}, "lora_alpha": 7}),
        ("ba_lora", "bert", {"folded": True, "lora_alpha": 6}),
    ],
)
def test_stock_peft_loads_it_in_a_process_without_hf_reg(
    method: str, family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    bare = build(family)
    bare.save_pretrained(tmp_path / "base")
    model = train(get_regularized_peft_model(bare, config_of(method, family, **settings)), family)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 8 and config["init_lora_weights"] is True
    assert not any("gamma" in key or "svd" in key or "hf_reg" in key for key in config)
    out = tmp_path / "logits.pt"
    torch.save(inputs(family), f"{out}.in")
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "base"), str(tmp_path / "adapter"), family, str(out)],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(out), logits(model, family), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_where_it_was(
    method: str, folded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train(adapted(method, folded=folded, rank_pattern={"q_proj": 6}))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(svd, "decompose", lambda *args, **kwargs: pytest.fail("decomposed again"))
    again = get_regularized_peft_model(build(), tmp_path)
    assert type(again) is type(model) and again.peft_config["default"] == model.peft_config["default"]
    assert torch.equal(logits(again), logits(model))
    train(again)
    train(model)
    assert torch.equal(logits(again), logits(model))


def test_what_else_is_trained_comes_back(tmp_path: Path) -> None:
    model = train(adapted("sorsa", "bert"), "bert")  # its classifier is trained whole
    model.save_pretrained(tmp_path)
    again = get_regularized_peft_model(build("bert"), tmp_path)
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))


def test_several_adapters_are_saved_each_in_its_folder(tmp_path: Path) -> None:
    model = train(adapted("sorsa"))
    model.add_adapter("plain", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    get_regularized_peft_model(model, config_of("ba_lora", r=3), "second")
    train(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "plain" / "hf_reg.json").exists()
    for name in ("default", "plain", "second"):
        model.set_adapter(name)
        folder = tmp_path if name == "default" else tmp_path / name
        stock = PeftModel.from_pretrained(build(), str(folder))
        torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=1e-5)
    other = get_regularized_peft_model(build(), tmp_path)
    other.load_adapter(str(tmp_path / "second"), "second")
    other.load_adapter(str(tmp_path / "plain"), "plain")
    for name in ("second", "plain"):
        model.set_adapter(name)
        other.set_adapter(name)
        assert torch.equal(logits(other), logits(model))


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (24, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize(
    ("method", "settings"),
    [("sorsa", {}), ("sorsa", {"orthonormality": "coupled", "folded": True}), ("ba_lora", {})],
)
def test_ten_steps_are_five_and_five_more(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    def run(folder: str, steps: int, resume: bool) -> tuple[Any, list[float]]:
        args = RegularizedTrainingArguments(
            str(tmp_path / folder), max_steps=10, save_steps=5, logging_steps=1, per_device_train_batch_size=2,
            learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        model = adapted(method, **settings)
        trainer = RegularizedTrainer(model=model, args=args, train_dataset=batches())
        if steps < 10:
            trainer.args.max_steps = steps  # the schedule of the learning rate goes on to 10
        trainer.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-5") if resume else None)
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole, losses = run("half", 10, False)
    resumed, rest = run("rest", 10, True)
    assert rest[-5:] == losses[-5:]
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert (tmp_path / "half" / "checkpoint-5" / "hf_reg.safetensors").is_file()


def test_a_trainer_reloads_its_best_adapter(tmp_path: Path) -> None:
    args = RegularizedTrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        learning_rate=1.0, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = adapted()
    rows = batches()
    trainer = RegularizedTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-6)


# what does not fit is refused, and changes nothing


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = train(adapted())
    model.save_pretrained(tmp_path / "a")
    wanted = logits(other := adapted("sorsa", r=3))
    with pytest.raises(ValueError, match=r"does not fit adapter 'default': .*lora_A is \(4, 48\) there and \(3, 48\)"):
        other.load_adapter(str(tmp_path / "a"), "default")
    assert torch.equal(logits(other), wanted)
    with pytest.raises(ValueError, match="holds a sorsa adapter, but 'default' is BALoraConfig"):
        adapted("ba_lora").load_adapter(str(tmp_path / "a"), "default")
    with pytest.raises(ValueError, match="key_mapping cannot be given for an SVD adapter"):
        model.load_adapter(str(tmp_path / "a"), "default", key_mapping={})
    get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"holds no hf_reg.json: expected a folder that save_pretrained"):
        other.load_adapter(str(tmp_path / "stock"), "default")
    with pytest.raises(ValueError, match=r"holds no hf_reg.json"):
        get_regularized_peft_model(build(), tmp_path / "nowhere")
    recipe = tmp_path / "a" / "hf_reg.json"
    recipe.write_text(recipe.read_text().replace('"sorsa"', '"sorsa_2"'))
    with pytest.raises(ValueError, match=r"no recipe of this version \(KeyError: 'sorsa_2'\).*newer hf_reg"):
        get_regularized_peft_model(build(), tmp_path / "a")


def test_a_damaged_file_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    train(adapted()).save_pretrained(tmp_path)
    path = tmp_path / "hf_reg.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    bare = build()
    names, wanted = list(bare.state_dict()), logits(bare)
    with pytest.raises(ValueError, match="the adapter cannot be read"):
        get_regularized_peft_model(bare, tmp_path)
    assert list(bare.state_dict()) == names and torch.equal(logits(bare), wanted)


def test_missing_factors_are_named(tmp_path: Path) -> None:
    train(adapted()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "hf_reg.safetensors")
    del tensors["base_model.model.model.layers.0.mlp.up_proj.start.lora_S"]
    save_file(tensors, tmp_path / "hf_reg.safetensors")
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.start.lora_S is missing there"):
        get_regularized_peft_model(build(), tmp_path)


def test_nothing_is_pickled_and_no_stock_configuration_is_written(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ValueError, match="safe_serialization=False would pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(RuntimeError, match="no configuration that PEFT could load"):
        SorsaConfig().save_pretrained(str(tmp_path))
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".partial")]
