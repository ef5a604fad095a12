"""The `hf_reg` block: what it says, when it comes and goes, and that a stock process loads what carries it."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from hf_reg import (
    RegularizedTrainer,
    RegularizedTrainingArguments,
    SorsaConfig,
    get_regularized_peft_model,
    patch_model,
    patched,
    unpatch_model,
)
from hf_reg.base import Penalty
from hf_reg.checkpoints.block import note_training
from hf_reg.checkpoints.reading import read_block
from hf_reg.optimizers import Companion, DecoupledL2SP, PerpGrad
from hf_reg.patches import TLM, DropHead, HeadMask
from hf_reg.penalties import EWC, PENALTIES
from hf_reg.recipes import make_penalties
from hf_reg.schedules import SCHEDULES, linear, v_shape

from ..adapters.models import VOCABULARY, build, inputs, logits
from ..adapters.test_storage import batches


STOCK = """
import sys
sys.modules["hf_reg"] = None  # an import of it would raise
import torch, transformers
found = {}
kinds = {"bert": "SequenceClassification", "llama": "CausalLM", "gpt2": "CausalLM", "t5": "Seq2SeqLM"}
for family, name in kinds.items():
    auto = getattr(transformers, f"AutoModelFor{name}")
    model, info = auto.from_pretrained(f"{sys.argv[1]}/{family}", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    batch = torch.load(f"{sys.argv[1]}/{family}.pt")
    with torch.no_grad():
        found[family] = model.eval()(**batch).logits
torch.save(found, f"{sys.argv[1]}/out.pt")
"""


def block(model: Any) -> Any:
    return getattr(model.config, "hf_reg", None)


def arguments(folder: Path, **settings: Any) -> RegularizedTrainingArguments:
    chosen = {"save_strategy": "no", "max_steps": 1} | settings
    return RegularizedTrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **chosen)


def saved(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("hf_reg")


def test_patched_models_of_every_family_load_in_a_process_without_hf_reg(tmp_path: Path) -> None:
    expected = {}
    for family in ("bert", "llama", "gpt2", "t5"):
        model = patch_model(build(family), [TLM(rate=0.3), DropHead(p=0.4, schedule="v_shape")])
        model.save_pretrained(tmp_path / family)
        torch.save(inputs(family), tmp_path / f"{family}.pt")
        expected[family] = logits(model, family)
        assert saved(tmp_path / family)["patches"]["tlm"]["rate"] == 0.3
        assert {path.suffix for path in (tmp_path / family).iterdir()} == {".json", ".safetensors"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for family, found in torch.load(tmp_path / "out.pt").items():
        assert torch.equal(found, expected[family]), family


def test_it_names_what_a_model_carries_and_goes_with_it() -> None:
    model = build("bert")
    before = model.config.to_dict()
    patch_model(model, "tlm")
    patch_model(model, HeadMask(heads={0: [1, 3]}))
    found = block(model)
    assert list(found) == ["version", "patches", "penalties", "seed", "versions"]
    assert found["patches"]["head_mask"] == {
        "heads": {"0": [1, 3]},
        "attention": "self",
        "submodel": "all",
        "schedule": None,
    }
    assert set(found["versions"]) == {"torch", "transformers", "peft", "accelerate"}
    json.dumps(found, allow_nan=False)
    unpatch_model(model, "tlm")
    assert list(block(model)["patches"]) == ["head_mask"]
    with patched(model, "drophead", p=0.3):
        assert list(block(model)["patches"]) == ["head_mask", "drophead"]
    assert list(block(model)["patches"]) == ["head_mask"]
    unpatch_model(model)
    assert (
        model.config.to_dict() == before
        and not hasattr(model.config, "hf_reg")
        and len(vars(model)) == len(vars(build("bert")))
    )


def test_a_patch_that_is_refused_leaves_no_block() -> None:
    model = build("bert")
    with pytest.raises(ValueError):
        patch_model(model, ["tlm", HeadMask(heads={0: [99]})])
    assert block(model) is None


def test_it_survives_saving_loading_copies_and_pickles(tmp_path: Path) -> None:
    model = patch_model(build("llama"), "tlm", layers=[0, -1], schedule=v_shape(warmup=0.2))
    wanted = block(model)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert saved(tmp_path / "b") == saved(tmp_path / "a") == wanted
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for made in (copied, torch.load(buffer, weights_only=False)):
        assert block(made) == wanted and block(made) is not wanted
        unpatch_model(made)
        assert block(made) is None and block(model) == wanted
    patch_model(loaded, "drophead")  # a checkpoint with a block gets it back
    assert list(block(loaded)["patches"]) == ["drophead"]
    unpatch_model(loaded)
    assert block(loaded) == wanted


@pytest.mark.parametrize("found", ["x", {"penalties": "x", "patches": 3}])
def test_a_block_that_is_none_is_replaced_and_comes_back(found: Any) -> None:
    model = build("bert")
    model.config.hf_reg = found  # what from_pretrained makes of any config.json
    patch_model(model, "tlm")
    assert list(block(model)["patches"]) == ["tlm"] and block(model)["penalties"] == {}
    unpatch_model(model)
    assert block(model) == found


def test_composite_configurations(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=VOCABULARY, **small)
    config = CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **small))
    model = patch_model(CLIPModel(config), "tlm", submodel="text")
    model.save_pretrained(tmp_path)
    assert saved(tmp_path) == block(model) and "hf_reg" not in json.dumps(model.config.text_config.to_dict())
    assert block(AutoModel.from_pretrained(tmp_path)) == block(model)
    unpatch_model(model)
    assert "hf_reg" not in json.dumps(model.config.to_dict())


def test_a_model_in_peft_carries_it_through_a_merge(tmp_path: Path) -> None:
    model = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    patch_model(model, "tlm")
    assert list(block(model)["patches"]) == ["tlm"]
    model.merge_and_unload().save_pretrained(tmp_path)
    assert list(saved(tmp_path)["patches"]) == ["tlm"]
    assert "hf_reg" not in json.dumps(model.peft_config["default"].to_dict(), default=str)


def test_the_trainer_adds_penalties_and_seed(tmp_path: Path) -> None:
    class Own(Penalty):
        NAME = "own"

        def __call__(self, model: Any, inputs: Any, outputs: Any) -> torch.Tensor:
            return outputs.logits.mean()

    model = build()
    penalties = [
        {"l2_sp": 0.01, "confidence": {"weight": 0.1, "schedule": linear(end=0.5)}, "mine": (0.2, lambda m, i, o: 0)},
        Own(weight=0.3), PENALTIES["l2"](weight=0.5, name="norm"),
    ]  # fmt: skip
    trainer = RegularizedTrainer(
        model=model, args=arguments(tmp_path, seed=7), train_dataset=batches(), penalties=penalties, patches="tlm"
    )
    found = block(model)
    assert found["seed"] == 7 and list(found["penalties"]) == ["l2_sp", "confidence", "mine", "own", "norm"]
    assert found["penalties"]["mine"] == {"method": "custom", "weight": 0.2}
    assert found["penalties"]["own"] == {"method": "custom", "weight": 0.3}
    assert found["penalties"]["norm"]["method"] == "l2" and found["penalties"]["norm"]["weight"] == 0.5
    assert found["penalties"]["confidence"]["schedule"] == {"linear": {"start": 1.0, "end": 0.5}}
    trainer.save_model(str(tmp_path / "out"))
    recipe = read_block(saved(tmp_path / "out"))
    assert recipe.patches == [TLM()] and [one.name for one in recipe.penalties] == ["confidence", "l2_sp", "norm"]
    assert recipe.penalties[0].schedule == linear(end=0.5) and recipe.seed == 7
    unpatch_model(model)  # it was trained with them all the same
    assert block(model) == found | {"patches": {}}


def test_companions_are_named_where_there_are_any(tmp_path: Path) -> None:
    class Own(Companion):
        NAME = "own"

    model = build()
    given = [DecoupledL2SP(alpha=0.2), Own()]
    trainer = RegularizedTrainer(
        model=model, args=arguments(tmp_path), train_dataset=batches(), companions=given, callbacks=[PerpGrad()]
    )
    found = block(model)["companions"]
    assert list(found) == ["decoupled_l2_sp", "own", "perp_grad"] and found["own"] == {"method": "custom"}
    assert found["decoupled_l2_sp"]["alpha"] == 0.2 and found["perp_grad"] == {"parameters": "all"}
    trainer.save_model(str(tmp_path / "out"))
    recipe = read_block(saved(tmp_path / "out"))
    assert [type(one) for one in recipe.companions] == [DecoupledL2SP, PerpGrad] and recipe.companions[0].alpha == 0.2
    before = block(model)
    patch_model(model, "tlm")
    assert block(model)["companions"] == found
    unpatch_model(model)
    assert block(model) == before
    for wrong, said in (
        ({"sgd": {}}, "unknown companion 'sgd'"), ([], "expected an object of names"),
        ({"perp_grad": {"parameters": "none"}}, "parameters='none'"), ({"perp_grad": {"of": 1}}, "no setting 'of'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            read_block(before | {"companions": wrong})


def test_penalties_without_patches_and_neither(tmp_path: Path) -> None:
    for penalties, named in ((None, None), ("l1", ["l1"])):
        model = build("bert")
        rows = [{"input_ids": torch.arange(5), "labels": torch.tensor(0)}]
        RegularizedTrainer(model=model, args=arguments(tmp_path), train_dataset=rows, penalties=penalties)
        assert (block(model) and list(block(model)["penalties"])) == named


def test_every_penalty_and_schedule_reads_back() -> None:
    model = build()
    made = [cls(weight=0.5) for cls in PENALTIES.values() if cls is not EWC]
    made.append(EWC(fisher={"weight": torch.ones(2)}, weight=0.5))
    note_training(model, made, 0)
    recipe = read_block(json.loads(json.dumps(block(model))))
    assert {one.name: type(one) for one in recipe.penalties} == {one.name: type(one) for one in made}
    assert "fisher" not in block(model)["penalties"]["ewc"]
    for name in SCHEDULES:
        model = patch_model(build(), "drophead", p=0.1, schedule=name)
        [patch] = read_block(json.loads(json.dumps(block(model)))).patches
        assert patch == DropHead(p=0.1, schedule=name)
    again = make_penalties(block(note(build(), made[:2]))["penalties"])  # what a trainer takes
    assert [one.name for one in again] == [one.name for one in made[:2]]


def note(model: Any, penalties: list[Penalty]) -> Any:
    note_training(model, penalties, 0)
    return model


def test_adapters_have_it_in_hf_reg_json(tmp_path: Path) -> None:
    made = {
        "plain": get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")),
        "sorsa": get_regularized_peft_model(build(), SorsaConfig(r=2, task_type="CAUSAL_LM")),
    }
    for name, model in made.items():
        trainer = RegularizedTrainer(
            model=model, args=arguments(tmp_path), train_dataset=batches(), penalties={"l1": 0.1}, patches="tlm"
        )
        trainer.save_model(str(tmp_path / name))
        found = json.loads((tmp_path / name / "hf_reg.json").read_text())
        assert list(found["hf_reg"]["patches"]) == ["tlm"] and list(found["hf_reg"]["penalties"]) == ["l1"]
        assert ("method" in found) == (name == "sorsa")
        stock = PeftModel.from_pretrained(build(), str(tmp_path / name))
        torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=1e-5)
    again = get_regularized_peft_model(build(), tmp_path / "sorsa")
    again.load_adapter(str(tmp_path / "plain"), "plain")  # hf_reg.json is there, but no SVD adapter
    assert torch.equal(logits(again), logits(made["sorsa"]))
    with pytest.raises(ValueError, match=r"holds no hf_reg.json"):
        get_regularized_peft_model(build(), tmp_path / "plain")
    plain = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear"))
    RegularizedTrainer(model=plain, args=arguments(tmp_path), train_dataset=batches()).save_model(
        str(tmp_path / "none")
    )
    assert not (tmp_path / "none" / "hf_reg.json").exists()
