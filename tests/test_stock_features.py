"""What is done to models goes on when they are patched or carry an adapter: captures, device maps, copies, saves."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_reg import get_regularized_peft_model, patch_model, unpatch_model, verify_checkpoint

from .adapters.models import METHODS, build, config_of, inputs, logits, train


def run(model: Any, **asked: Any) -> Any:
    """One forward in training mode with the masks of one seed."""
    torch.manual_seed(3)
    ids = inputs()["input_ids"]
    with torch.no_grad():
        return model.train()(input_ids=ids, **asked)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_and_attentions_are_captured(attention: str) -> None:
    model = build()
    model.set_attn_implementation(attention)
    asked = {"output_hidden_states": True} | ({"output_attentions": True} if attention == "eager" else {})
    plain = run(model, **asked)
    patch_model(model, ["tlm", "drophead"])
    found, without = run(model, **asked), run(model)
    assert torch.equal(found.logits, without.logits) and not torch.equal(found.logits, plain.logits)
    assert len(found.hidden_states) == 3 and torch.equal(model.lm_head(found.hidden_states[-1]), found.logits)
    if attention == "eager":
        assert [one.shape for one in found.attentions] == [one.shape for one in plain.attentions]
        assert not torch.equal(found.attentions[0], plain.attentions[0])  # what the mask of TLM left
    evaluated = model.eval()(input_ids=inputs()["input_ids"], **asked)
    wanted = unpatch_model(model).eval()(input_ids=inputs()["input_ids"], **asked)
    for one, other in zip(evaluated.hidden_states, wanted.hidden_states, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_device_maps(where: str, tmp_path: Path) -> None:
    """accelerate's hooks stand around every module; a layer on the disk has no weights until it runs."""
    expected = run(patch_model(build(), ["tlm", "drophead"])).logits
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.rotary_emb", "model.norm"], "cpu")
    places |= {"model.layers.1": where, "lm_head": "cpu"}
    model = dispatch_model(build(), places, "cpu", offload_dir=tmp_path / "offload", force_hooks=True)
    assert hasattr(patch_model(model, ["tlm", "drophead"]).model.layers[1], "_hf_hook")
    assert torch.equal(run(model).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(build()))
    assert torch.equal(run(unpatch_model(model)).logits, run(build()).logits)
    dispatched = dispatch_model(patch_model(build(), ["tlm", "drophead"]), {"": "cpu"}, "cpu", force_hooks=True)
    assert torch.equal(run(dispatched).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_device_maps_of_svd_adapters(method: str, tmp_path: Path) -> None:
    model = train(get_regularized_peft_model(build(), config_of(method)))
    expected = logits(model)
    model = dispatch_model(model, {"": "cpu"}, "cpu", force_hooks=True)
    assert torch.equal(logits(model), expected)
    train(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(build(), tmp_path)), logits(model), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["patched", "patched in PEFT", "sorsa"])
def test_save_pretrained_of_its_own(kind: str, tmp_path: Path) -> None:
    """In shards, with the arguments that scripts give; and again after a copy and a pickle."""
    base = build()
    base.save_pretrained(tmp_path / "base")
    if kind == "sorsa":
        model = train(get_regularized_peft_model(base, config_of("sorsa")))
    elif kind == "patched":
        model = patch_model(base, ["tlm", "drophead"])
    else:
        adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = patch_model(get_peft_model(base, adapter), "tlm")
    for name, made in {
        "own": model,
        "copy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
    }.items():
        folder = tmp_path / name
        made.save_pretrained(folder, max_shard_size="20KB", safe_serialization=True)
        assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md"}
        if kind == "patched":
            assert len(list(folder.glob("model-*.safetensors"))) > 2
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        else:
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    if kind == "patched":
        assert verify_checkpoint(tmp_path / "own", model=model).passed
