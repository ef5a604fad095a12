"""Layers that train other tensors than their weight: what is found, what is refused, resumed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, describe, patch_model, patched, unpatch_model
from hf_reg.seams.reparameterized import Reparameterized, named_layers
from hf_reg.sites.weights import find_weights, find_weights_uncovered
from hf_reg.training.weights import TENSORS

from .architectures import build, forward
from .distributed.heads import make, rows


PATCHES = {"weight_compander": {"learned": True}, "factorized": {"rank": 0.5}}
EXPECTED = {  # linear layers of attention and of FFN in the two layers of a tiny model, and what stays out
    "bert": (8, 4, {}), "gpt2": (4, 4, {}), "llama": (8, 6, {}), "phi3": (4, 4, {}), "modernbert": (4, 4, {}),
    "deberta-v2": (8, 4, {}), "mixtral": (8, 0, {"MixtralExperts": 2}), "gpt_neox": (4, 4, {}), "vit": (8, 4, {}),
}  # fmt: skip


@pytest.mark.parametrize("model_type", EXPECTED)
def test_the_linear_layers_are_found(model_type: str) -> None:
    model = build(model_type).model
    attention, ffn, uncovered = EXPECTED[model_type]
    sites = find_weights(model)
    kinds = [site.kind for site in sites]
    assert (kinds.count("attention"), kinds.count("ffn")) == (attention, ffn), [site.path for site in sites]
    assert find_weights_uncovered(model, sites) == uncovered
    assert all(model.get_submodule(site.path) is site.module for site in sites)
    assert {(site.layer, site.layers) for site in sites} == {(0, 2), (1, 2)}
    before = [site.path for site in sites]
    patch_model(model, "weight_compander")
    assert [site.path for site in find_weights(model)] == before
    assert describe(model).rows[0].patched == len(sites)  # type: ignore[attr-defined]


def train(folder: Path, patch: str, steps: int, resume: bool = False, penalties: Any = None, **settings: Any) -> Any:
    args = RegularizedTrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=3, report_to=[],
        logging_steps=1, use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = RegularizedTrainer(
        model=make("classes/bert"), args=args, train_dataset=rows("classes/bert", 16), penalties=penalties,
        patches={patch: settings or PATCHES[patch]} if patch else None,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{steps}") if resume else None)
    return trainer


@pytest.mark.parametrize("patch", PATCHES)
def test_a_resumed_run_is_the_same_run_and_its_checkpoints_are_stock(tmp_path: Path, patch: str) -> None:
    whole = train(tmp_path, patch, 6).model
    checkpoint = tmp_path / "checkpoint-3"
    stock = make("classes/bert").state_dict()
    saved = load_file(checkpoint / "model.safetensors")
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in stock.items()}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6").eval()
    batch = {k: torch.stack([row[k] for row in rows("classes/bert")]) for k in ("input_ids",)}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, whole.eval()(**batch).logits, rtol=1e-5, atol=1e-5)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)
    resumed = train(tmp_path, patch, 3, resume=True).model
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    (checkpoint / TENSORS).unlink()
    with pytest.raises(ValueError, match=r"does not fit the patches of this run: \S+ is missing there"):
        train(tmp_path, patch, 3, resume=True)


def test_a_checkpoint_of_another_patch_is_refused(tmp_path: Path) -> None:
    train(tmp_path, "factorized", 6)
    with pytest.raises(ValueError, match=r"missing here. Resume with the patches"):
        train(tmp_path, "", 3, resume=True)
    with pytest.raises(ValueError, match=r"weight_u is \(32, 16\) there and \(32, 8\) here"):
        train(tmp_path, "factorized", 3, resume=True, rank=0.25)
    trainer = train(tmp_path, "", 6)
    assert not (tmp_path / "checkpoint-3" / TENSORS).exists(), "the tensors of an earlier run are left"
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / TENSORS).exists()


@pytest.mark.parametrize("kind", ["factorized", "lora"])
def test_frobenius_decay_takes_the_place_of_weight_decay(kind: str, tmp_path: Path) -> None:
    args = RegularizedTrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    trainer = RegularizedTrainer(
        model=make("classes/bert"), args=args, patches="factorized",
        penalties={"frobenius_decay": {"weight": 0.1, "kind": kind}},
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    left = {names[id(p)] for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    factors = {name for name in names.values() if name.endswith(("weight_u", "weight_v"))}
    assert len(factors) == 24 and decayed | left == set(names.values())
    assert factors <= left if kind == "factorized" else factors <= decayed
    assert "classifier.weight" in decayed and "classifier.bias" in left


def test_penalties_anchor_what_is_trained(tmp_path: Path) -> None:
    """L2-SP remembers v, not w: it is 0 before the first step."""
    args = RegularizedTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = RegularizedTrainer(
        model=make("classes/bert"), args=args, patches="weight_compander",
        penalties={"l2_sp": {"weight": 1.0, "alpha": 1.0, "beta": 0.0}},
    )  # fmt: skip
    assert trainer.penalties[0](trainer.model, {}, None).item() == 0


@pytest.mark.parametrize("patch", PATCHES)
def test_patched_gives_back_the_same_parameters(patch: str) -> None:
    model = patch_model(build("bert").model, patch, **PATCHES[patch])
    layer = model.encoder.layer[0].output.dense
    with torch.no_grad():
        layer.weight_v += 0.1
    before, values = dict(model.named_parameters()), {n: p.clone() for n, p in model.named_parameters()}
    with patched(model, "tlm"):
        pass
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert all(torch.equal(values[name], after[name]) for name in after)
    with patched(model, patch, layers=[1]):
        assert sum(1 for _ in named_layers(model)) == 6
        layer.weight = nn.Parameter(layer.weight * 2)  # trained meanwhile, as a dense layer
        doubled = layer.weight.detach().clone()
    torch.testing.assert_close(layer.weight.detach(), doubled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", PATCHES)
def test_compiles_in_one_graph(patch: str) -> None:
    tiny = build("llama")
    tiny.inputs["use_cache"] = False
    model = patch_model(tiny.model.train(), patch, **PATCHES[patch])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**tiny.inputs)[0], model(**tiny.inputs)[0], rtol=1e-4, atol=1e-5)
    compiled(**tiny.inputs)[0].square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**tiny.inputs)[0].square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-4)
    assert any("weight_v" in name for name in found)


def test_adapters_are_refused_before_and_after() -> None:
    config = LoraConfig(target_modules=["query"], r=2)
    with pytest.raises(ValueError, match=r"weight_compander: \S+query carries an adapter.*merge_and_unload"):
        patch_model(get_peft_model(build("bert").model, config), "weight_compander")
    model = get_peft_model(build("bert").model, config)
    patch_model(model, "weight_compander", branch="ffn")  # other layers are free
    tiny = build("bert")
    wrapped = get_peft_model(patch_model(tiny.model, "factorized"), config)
    with pytest.raises(RuntimeError, match=r"took the place of a layer that is patched at its weight \(query\)"):
        wrapped(**tiny.inputs)


def test_what_is_refused_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    def refused(model: nn.Module, text: str, patch: Any = "weight_compander") -> None:
        with pytest.raises(ValueError, match=text):
            patch_model(model, patch)
        assert not any(True for _ in named_layers(model)) and not hasattr(model.config, "hf_reg")

    model = build("bert").model
    refused(model, "both train other tensors", ["weight_compander", "factorized"])
    layer = model.encoder.layer[1].output.dense
    layer.weight = model.encoder.layer[0].output.dense.weight
    refused(model, r"encoder.layer.0.output.dense shares its weight with 1 other modules")
    layer.weight = nn.Parameter(torch.full_like(layer.weight, float("nan")))
    refused(model, r"encoder.layer.1.output.dense has weights that are not finite", "factorized")
    layer.weight = nn.Parameter(torch.empty_like(layer.weight, device="meta"))
    refused(model, r"holds a shard or a placeholder \(Parameter on meta\)")
    layer.weight = nn.Parameter(torch.ones_like(layer.weight, device="cpu", dtype=torch.uint8), requires_grad=False)
    refused(model, r"is quantised \(Linear, torch.uint8\)")
    layer.weight = nn.Parameter(torch.ones(layer.weight.shape))
    patch_model(model, "weight_compander")
    with pytest.raises(ValueError, match="is under 'weight_compander' already"):
        patch_model(model, "factorized")
    with pytest.raises(ValueError, match="The optimizer .* exists already"):
        RegularizedTrainer(
            model=make("classes/bert"), args=RegularizedTrainingArguments(str(tmp_path), use_cpu=True),
            patches="weight_compander", optimizers=(torch.optim.SGD(model.parameters(), 0.1), None),
        )  # fmt: skip


def test_a_ddp_model_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(build("bert").model)
        with pytest.raises(ValueError, match="replaces parameters that DistributedDataParallel holds already"):
            patch_model(wrapped, "factorized")
        patch_model(wrapped, "tlm")
    finally:
        torch.distributed.destroy_process_group()


def test_frozen_weights_stay_frozen() -> None:
    model = build("bert").model.requires_grad_(False)
    patch_model(model, "factorized")
    assert not any(p.requires_grad for p in model.parameters())
    unpatch_model(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_skipped_heads_and_factors_go_together() -> None:
    """drophead with skip=True finds that it cannot slice these layers, and skips attention only."""
    tiny = build("bert")
    model = tiny.model.train()
    patch_model(model, ["weight_compander", "drophead"])
    unpatch_model(model)
    patch_model(model, "drophead", p=0.5, skip=True, granularity="batch")
    model(**tiny.inputs)
    with pytest.raises(ValueError, match="may be sliced by drophead"):
        patch_model(model, "factorized")
    unpatch_model(model)
    patch_model(model, "factorized")
    patch_model(model, "drophead", p=0.5, skip=True, granularity="batch")
    assert all(o.isfinite().all() for o in forward(model, tiny.inputs))


def test_the_card_of_a_saved_model_names_the_patch(tmp_path: Path) -> None:
    model = patch_model(make("classes/bert"), "factorized", rank=0.5)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hf_reg"]["patches"] == {
        "factorized": {"rank": 0.5, "branch": "all", "layers": "all", "submodel": "all", "schedule": None}
    }
    assert not any(isinstance(module, Reparameterized) for module in make("classes/bert").modules())


def test_an_empty_model_is_counted_but_takes_no_weights() -> None:
    full = build("bert").model
    for patch in PATCHES:
        with torch.device("meta"):
            empty = type(full)(full.config)
        patch_model(empty, patch)
        row = describe(empty).rows[0]  # type: ignore[attr-defined]
        assert (row.patched, row.found, row.notes) == (12, 12, "")
        with pytest.raises(ValueError, match="patched while empty. Patch after loading"):
            empty.load_state_dict(full.state_dict(), assign=True)
