"""load_regularized: what was saved comes back patched; what others may have put into a folder is refused in words."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertModel

from hf_reg import (
    SorsaConfig,
    __version__,
    describe,
    get_regularized_peft_model,
    load_regularized,
    patch_model,
    unpatch_model,
)
from hf_reg.checkpoints.reading import read_block
from hf_reg.patches import TLM, DropHead, HeadMask
from hf_reg.seams.attention import gates

from ..adapters.models import FAMILIES, adapted, build, logits, train


def patches_on(model: Any) -> dict[str, Any]:
    return {gate.patch.name: gate.patch for gate in gates(model)}


def trained_output(model: Any, family: str) -> torch.Tensor:
    torch.manual_seed(3)
    from ..adapters.models import inputs

    with torch.no_grad():
        return model.train()(**inputs(family)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_back_patched(family: str, tmp_path: Path) -> None:
    given = [DropHead(p=0.4, schedule="v_shape"), HeadMask(heads={-1: [0, 2], 0: [1]}), TLM(rate=0.3, layers=(0, -1))]
    if family == "t5":
        given = [TLM(rate=0.3, submodel="encoder")]
    model = patch_model(build(family), given)
    model.save_pretrained(tmp_path / "a")
    loaded = load_regularized(tmp_path / "a")
    assert type(loaded) is type(model) and not loaded.training
    assert patches_on(loaded) == {patch.name: patch for patch in given}
    assert torch.equal(logits(loaded, family), logits(model, family))
    assert torch.equal(trained_output(loaded, family), trained_output(model, family))
    assert str(describe(loaded)) == str(describe(model))
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    blocks = [json.loads((tmp_path / name / "config.json").read_text())["hf_reg"] for name in "ab"]
    assert blocks[0] == blocks[1]
    assert not patches_on(unpatch_model(loaded))


@pytest.mark.parametrize("kind", ["plain", "sorsa"])
def test_adapters_come_back_with_their_base(kind: str, tmp_path: Path) -> None:
    from hf_reg import RegularizedTrainer

    from .test_block import arguments, batches

    base = build()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if kind == "plain":
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        model = get_regularized_peft_model(base, SorsaConfig(r=2, task_type="CAUSAL_LM"))
    train(model)
    trainer = RegularizedTrainer(model=model, args=arguments(tmp_path), train_dataset=batches(), patches="tlm")
    trainer.save_model(str(tmp_path / "a"))
    loaded = load_regularized(tmp_path / "a")
    assert type(loaded).__name__ == "PeftModelForCausalLM" and list(patches_on(loaded)) == ["tlm"]
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)
    assert any(parameter.requires_grad for parameter in loaded.parameters())
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"The base of the adapter cannot be used.*Pass base="):
        load_regularized(tmp_path / "a")
    torch.testing.assert_close(logits(load_regularized(tmp_path / "a", base=tmp_path / "moved")), logits(model))


def test_an_auto_class_and_further_arguments(tmp_path: Path) -> None:
    patch_model(build("bert"), "tlm").save_pretrained(tmp_path)
    assert type(load_regularized(tmp_path, auto_class="AutoModel")) is BertModel
    assert type(load_regularized(tmp_path, auto_class=BertModel)) is BertModel
    assert load_regularized(tmp_path, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="expected a class such as AutoModelForCausalLM, or its name"):
        load_regularized(tmp_path, auto_class="Trainer")
    for name in ("trust_remote_code", "use_safetensors", "weights_only", "config"):
        with pytest.raises(ValueError, match=f"load_regularized takes no {name}"):
            load_regularized(tmp_path, **{name: False})
    with pytest.raises(ValueError, match="revision: for a repository of the Hub, but"):
        load_regularized(tmp_path, revision="main")
    with pytest.raises(ValueError, match="base=.* is for adapters"):
        load_regularized(tmp_path, base=tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a repository of the Hub"):
        load_regularized(tmp_path / "nowhere")


def test_a_checkpoint_without_a_block_is_loaded_with_a_word(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="names no regularization: loaded as it is"):
        assert not patches_on(load_regularized(tmp_path))


# hostile folders


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


INDEX = "model.safetensors.index.json"


def touched(path: Path) -> Path:
    path.touch()
    return path


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))


def index(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))

    return make


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **values)


def remote_code(folder: Path) -> None:
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(folder.parent / 'exploded')!r}).touch()\n")
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoModelForSequenceClassification": "code.M"}
    change(folder / "config.json", model_type="unheard_of", auto_map=auto)


def shorter(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "bert.embeddings.word_embeddings.weight"):
        tensors[name] = tensors[name][:, :3].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pipe(name: str) -> Callable[[Path], None]:
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))[1]


def directory(name: str) -> Callable[[Path], None]:
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())[1]


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled weights": (pickled, r"holds only pytorch_model.bin, which may run code.*Only safetensors are read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no weights"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"holds neither config.json nor adapter_config.json"),
    "index upwards": (index("../outside.safetensors"), r"names '../outside.safetensors'; expected names"),
    "index absolute": (index("/etc/passwd"), r"names '/etc/passwd'; expected"),
    "index backslash": (index("..\\outside.safetensors"), r"expected names of safetensors files in the folder"),
    "index to pickle": (index("pytorch_model.bin"), r"names 'pytorch_model.bin'; expected"),
    "index to nothing": (index("model-00001-of-00001.safetensors"), r"which is not in the folder"),
    "remote code": (remote_code, r"custom code|trust_remote_code"),
    "kernel of the Hub": (config(attn_implementation="someone/kernel"), r"names code of the Hub, which is not run"),
    "nested kernel": (config(x=[{"_attn_implementation": "a/b:c"}]), r"names code of the Hub"),
    "other configuration": (config(configuration_files=["config.1.0.0.json"]), r"configuration_files makes further"),
    "other weights": (config(transformers_weights="../a.safetensors"), r"expected a safetensors file in"),
    "architectures": (config(architectures=["os.system"]), r"no Auto class of transformers has 'os.system'"),
    "no architecture": (config(architectures=None), r"architectures is None; expected one name"),
    "huge configuration": (config(x="a" * 11_000_000), r"bytes; such a file has at most 10,000,000"),
    "endless nesting": (lambda f: (f / "config.json").write_text('{"a":' + "[" * 100_000), r"is no JSON file"),
    "deep nesting": (config(x=json.loads("[" * 900 + "]" * 900)), r"more than 100 lists and objects inside of each"),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), r"is no JSON file.*can't decode"),
    "huge hf_reg.json": (lambda f: os.truncate(touched(f / "hf_reg.json"), 100_000_000), r"has 100,000,000 bytes;"),
    "huge index": (
        lambda f: (f / "model.safetensors").unlink() or os.truncate(touched(f / INDEX), 10**9),
        r"has 1,000,000,000 bytes",
    ),
    "sparse configuration": (lambda f: os.truncate(f / "config.json", 10**11), r"has 100,000,000,000 bytes"),
    "shapes": (
        shorter,
        r"bert.embeddings.word_embeddings.weight is \[60, 3\], expected \[60, 32\]; classifier.weight is \[3, 3\], ",
    ),
    "endless sizes": (config(hidden_size=10**9), r"LayerNorm.bias is \[32\], expected \[1000000000\].*; and \d+ more"),
    "no header": (lambda f: os.truncate(f / "model.safetensors", 4), r"is no whole safetensors file: .*too small"),
    "cut header": (lambda f: os.truncate(f / "model.safetensors", 100), r"is no whole safetensors file: .*invalid"),
    "cut tensors": (lambda f: os.truncate(f / "model.safetensors", 20_000), r"is no whole safetensors file"),
    "endless header": (
        lambda f: (f / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}"), r"header too large"
    ),
    "configuration is a folder": (directory("config.json"), r"holds neither config.json nor adapter_config.json"),
    "configuration is a pipe": (pipe("config.json"), r"holds neither config.json nor adapter_config.json"),
    "weights are a folder": (directory("model.safetensors"), r"holds no weights"),
    "weights are a pipe": (pipe("model.safetensors"), r"holds no weights"),
    "configuration of elsewhere": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("/etc/passwd")), r"is no JSON file"
    ),
    "list": (lambda f: (f / "config.json").write_text("[]"), r"holds a list; expected a JSON object"),
    "NaN": (lambda f: (f / "config.json").write_text('{"hf_reg": NaN}'), r"NaN is no number of JSON"),
    "prompt adapter": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}'),
        r"expected adapter_model.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_are_refused_in_words(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    patch_model(build("bert"), "tlm").save_pretrained(folder)
    spoil, text = HOSTILE[name]
    spoil(folder)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    began = time.perf_counter()
    with pytest.raises(ValueError, match=text):
        load_regularized(folder)
    assert time.perf_counter() - began < 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before  # nothing ran or was written


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"base_model_name_or_path": ""}, r"names '' as its base. Pass base="),
        ({"base_model_name_or_path": "../../etc"}, r"The base of the adapter cannot be used: .*Pass base="),
        (
            {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
            r"megatron_config makes further files",
        ),
        ({"peft_type": "PROMPT_TUNING"}, r"peft_type is 'PROMPT_TUNING'; expected 'LORA'"),
    ],
)
def test_hostile_adapters_are_refused_in_words(values: dict[str, Any], text: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    change(tmp_path / "adapter_config.json", **values)
    with pytest.raises(ValueError, match=text):
        load_regularized(tmp_path)


def test_a_pickled_adapter_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match=r"holds only adapter_model.bin, which may run code"):
        load_regularized(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", ["lora", "sorsa"])
def test_an_adapter_of_another_model_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if kind == "lora":
        model: Any = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        model = get_regularized_peft_model(base, SorsaConfig(r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / ("adapter_model.safetensors" if kind == "lora" else "hf_reg.safetensors")
    tensors = load_file(file)
    name = next(name for name, one in tensors.items() if one.dim() == 2)
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit .*down_proj.*48"):
        load_regularized(tmp_path / "a")


GOOD = {"version": __version__, "patches": {"tlm": {"rate": 0.1}}, "penalties": {}, "seed": 1, "versions": {}}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"patches": {"os.system": {}}}, r"unknown patch 'os.system'.* Known: tlm, drophead, head_mask"),
        ({"patches": {"tlm": {"rat": 0.1}}}, r"tlm has no setting 'rat'. Did you mean 'rate'\?"),
        ({"patches": {"tlm": {"rate": 7}}}, r"rate=7 is out of range; give 0 <= rate < 1"),
        ({"patches": {"tlm": {"rate": "0.1"}}}, r"rate='0.1' is no value of the type <class 'float'>"),
        ({"patches": {"tlm": {"rate": float("nan")}}}, r"rate=nan is no value"),
        ({"patches": {"tlm": {"rate": True}}}, r"rate=True is no value"),
        ({"patches": {"tlm": {"mode": {"a": [1]}}}}, r"mode={'a': \[1\]} is no value"),
        ({"patches": {"tlm": {"replace_dropout": "yes"}}}, r"replace_dropout='yes' is no value"),
        ({"patches": {"tlm": {"spare_token_ids": [2**70]}}}, r"spare_token_ids=.* is no value"),
        ({"patches": {"tlm": {"schedule": {"linear": {"stop": 1}}}}}, r"schedule linear has no setting 'stop'"),
        ({"patches": {"tlm": {"schedule": {"linear": {"start": "1"}}}}}, r"start='1' must be a finite number"),
        ({"patches": {"tlm": {"schedule": "__import__"}}}, r"Unknown schedule '__import__'"),
        ({"patches": {"tlm": []}}, r"tlm is \[\]; expected an object with its settings"),
        ({"patches": {"tlm": {"patch": "drophead"}}}, r"tlm has no setting 'patch'"),
        ({"patches": ["tlm"]}, r"patches is \['tlm'\]; expected an object of names"),
        ({"patches": {"head_mask": {"heads": {"x": [1]}}}}, r"heads={'x': \[1\]} is no value"),
        ({"patches": {"head_mask": {"heads": {}}}}, r"head_mask needs heads="),
        ({"penalties": {"eval": {"weight": 1}}}, r"unknown penalty 'eval'. Known: "),
        ({"penalties": {"l1": 0.1}}, r"penalty 'l1' is 0.1; expected an object"),
        ({"penalties": {"l1": {"weight": -1}}}, r"weight=-1 is out of range"),
        ({"penalties": {"l1": {"weight": float("inf")}}}, r"weight=inf is no value"),
        ({"penalties": {"l1": {"name": "task"}}}, r"l1 has no setting 'name'"),
        ({"penalties": {"task": {"method": "l1"}}}, r"other than 'task'"),
        ({"penalties": {"a": {"method": ["l1"]}}}, r"unknown penalty \['l1'\]"),
        ({"penalties": {"a": {"method": "custom", "weight": 1, "function": "os.system"}}}, r"user's own, yet has"),
        ({"penalties": {"ewc": {"fisher": {"w": [1.0]}}}}, r"fisher=.* is no value"),
        ({"seed": "1"}, r"seed is '1'"),
        ({"version": 1}, r"version is 1"),
        ({"versions": {"torch": {}}}, r"versions is {'torch': {}}"),
        ({"code": "print(1)"}, r"further keys, \['code'\]; expected version, patches, penalties, seed, versions"),
        ({"versions": {"a": "b" * 1_000_001}}, r"characters; at most 1,000,000 are read"),
        ({"version": "99.0", "patches": {"new": {}}}, r"unknown patch 'new'.*hf_reg '99.0' wrote it, newer than this"),
    ],
)
def test_hostile_blocks_are_refused_in_words(values: dict[str, Any], text: str) -> None:
    assert read_block(GOOD).patches == [TLM()]
    with pytest.raises(ValueError, match=r"The hf_reg block cannot be used: .*" + text):
        read_block(GOOD | values)


@pytest.mark.parametrize("given", [None, 3, "tlm", [], {"patches": {}}])
def test_what_is_no_block_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"The hf_reg block cannot be used: it (is|lacks)"):
        read_block(given)


def test_a_newer_block_that_is_understood_says_so() -> None:
    with pytest.warns(UserWarning, match=r"understood, but hf_reg '99.0' wrote it, newer than this"):
        assert read_block(GOOD | {"version": "99.0"}).patches == [TLM()]


def test_a_block_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    change(tmp_path / "config.json", hf_reg=GOOD | {"patches": {"tlm": {"layers": [10**9]}}})
    with pytest.raises(ValueError, match=r"do not exist. Layers of this model"):
        load_regularized(tmp_path)
    change(tmp_path / "config.json", hf_reg="x")
    with pytest.raises(ValueError, match=r"The hf_reg block cannot be used: it is 'x'"):
        load_regularized(tmp_path)
