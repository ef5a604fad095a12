"""Dynamic dropout and the two baselines at the same seam: what is moved, by how much, and what comes back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import BertConfig, BertForSequenceClassification

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, describe, patch_model, patched, unpatch_model
from hf_reg.dropout import set_dropout
from hf_reg.dropout.finding import find_dropouts
from hf_reg.dropout.places import Map
from hf_reg.schedules import curriculum, linear, model_step, on_plateau
from hf_reg.seams.attention import gates, seams
from hf_reg.seams.dropout import PlaceGate

from .architectures import build, forward
from .properties import reseed, without_dropout


def rates(model: nn.Module, kind: str) -> list[float]:
    """What the places of `kind` drop at: the gates that act, by place."""
    acting = [gate for gate in gates(model) if isinstance(gate, PlaceGate) and gate.acts]
    own = {(id(gate.dial.owner), gate.dial.attribute): gate for gate in acting if gate.dial}
    found = []
    for place in Map(model).of(kind):
        gate = own.get((id(place.owner), place.attribute))
        found.append(gate.p * gate.factor if gate else getattr(place.owner, place.attribute))
    return found


def numbers(model: nn.Module) -> dict[str, float]:
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is float
    }


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5", "bart", "opt", "deberta-v2", "modernbert"])
def test_rates_follow_the_schedule_and_come_back_exactly(model_type: str) -> None:
    model = build(model_type).model
    set_dropout(model, attention=0.1, hidden=0.3)
    before, config = numbers(model), copy.deepcopy(model.config.to_dict())
    patch_model(model, "dynamic_dropout", schedule=linear(1.0, 0.5))
    for step, factor in ((0, 1.0), (5, 0.75), (10, 0.5)):
        model_step(model, step, 10)
        assert rates(model, "attention") == pytest.approx([0.1 * factor] * len(Map(model).of("attention")))
        assert rates(model, "hidden") == pytest.approx([0.3 * factor] * len(Map(model).of("hidden")))
    assert {k: v for k, v in model.config.to_dict().items() if k != "hf_reg"} == config
    unpatch_model(model)
    assert numbers(model) == before and model.config.to_dict() == config and not seams(model)


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of torch's own dropout, which stock modules draw."""
    for place in ("hf_reg.base", "hf_reg.seams.dropped"):
        monkeypatch.setattr(f"{place}.drop_units", torch.nn.functional.dropout)
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("hf_reg.seams.dropped.dropped_attention", attention)


@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize("model_type", ["bert", "llama", "bart"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_a_model_that_was_set_to_the_rate_of_the_step(model_type: str, attention: str) -> None:
    """Same seed, same masks: at every step the forward is that of the stock model with these rates."""
    tiny = build(model_type, attn_implementation=attention)
    stock = copy.deepcopy(tiny.model)
    for model in (tiny.model, stock):
        set_dropout(model, attention=0.4, hidden=0.2)
    patch_model(tiny.model, "dynamic_dropout", schedule="cosine")
    for step in (0, 3, 7):
        model_step(tiny.model, step, 10)
        factor = [gate.factor for gate in gates(tiny.model)][0]
        set_dropout(stock, attention=0.4 * factor, hidden=0.2 * factor)
        outputs = []
        for model in (tiny.model, stock):
            reseed(0)
            outputs.append(forward(model.train(), tiny.inputs))
        assert factor > 0 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*outputs, strict=True))


def test_the_factor_zero_is_the_forward_without_dropout() -> None:
    tiny = build("bart")
    patch_model(tiny.model.train(), "dynamic_dropout", p=0.5)
    model_step(tiny.model, 10, 10)
    outputs = forward(tiny, tiny.inputs)
    state = torch.get_rng_state()
    assert torch.equal(outputs[0], forward(tiny, tiny.inputs)[0]) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kinds", ["attention", "hidden", "ffn"])
def test_one_kind_alone(kinds: str) -> None:
    model = build("t5").model
    patch_model(model, "dynamic_dropout", kinds=kinds, p=0.4)
    model_step(model, 5, 10)
    assert {kind: set(rates(model, kind)) for kind in ("attention", "hidden", "ffn")} == {
        "attention": {0.1}, "hidden": {0.1}, "ffn": {0.1}
    } | {kinds: {0.2}}  # fmt: skip


def test_dropout_of_set_dropout_and_of_patches_moves_too() -> None:
    model = build("llama").model
    set_dropout(model, hidden=0.2)
    patch_model(model, "ffn_dropout", p=0.4)
    patch_model(model, "dynamic_dropout")
    model_step(model, 5, 10)
    ffn = [gate for gate in gates(model) if gate.patch.name == "ffn_dropout"]
    moved = [gate for gate in gates(model) if gate.patch.name == "dynamic_dropout"]
    assert [gate.p for gate in ffn] == [0.2, 0.2] and ffn[0].rate == pytest.approx(0.2)
    assert sorted(gate.p * gate.factor for gate in moved) == pytest.approx([0.1] * 4 + [0.2] * 2)
    assert "dynamic_dropout" in str(describe(model))
    unpatch_model(model, "dynamic_dropout")
    assert [gate.p for gate in ffn] == [0.4, 0.4]
    patch_model(model, "dynamic_dropout")
    unpatch_model(model)
    assert not seams(model) and [m.p for m in model.modules() if type(m).__name__ == "AddedDropout"] == [0.2] * 4


def test_the_last_patch_at_a_place_sets_the_rate_whatever_is_taken_off_first() -> None:
    for first in ("attention_dropout", "dynamic_dropout"):
        model = build("bert").model
        patch_model(model, "attention_dropout", p=0.4)
        patch_model(model, "dynamic_dropout", kinds="attention")
        model_step(model, 5, 10)
        assert rates(model, "attention") == [0.2, 0.2]
        with patched(model, "attention_dropout", p=0.3):
            assert rates(model, "attention") != [0.2, 0.2]
        assert rates(model, "attention") == [0.2, 0.2]
        unpatch_model(model, first)
        assert rates(model, "attention") == [0.05, 0.05] if first == "attention_dropout" else [0.4, 0.4]
        unpatch_model(model)
        assert rates(model, "attention") == [0.1, 0.1] and not seams(model)


def test_two_patches_at_a_place_drop_once() -> None:
    model = patch_model(build("bert").model.train(), "hidden_dropout", p=0.5)
    patch_model(model, "dynamic_dropout", kinds="hidden")
    out = model.embeddings.dropout(torch.ones(10_000))
    assert set(out.tolist()) == {0.0, 2.0}


def test_settings_are_replaced_while_the_rates_are_moved() -> None:
    model = build("bert").model
    patch_model(model, "dynamic_dropout")
    model_step(model, 10, 10)
    patch_model(model, "dynamic_dropout", schedule="curriculum")  # all rates are 0 now; their own ones are not
    model_step(model, 10, 10)
    assert len(list(gates(model))) == 7
    assert rates(model, "hidden") == pytest.approx([0.1] * 5, rel=1e-3)
    unpatch_model(model)
    assert rates(model, "hidden") == [0.1] * 5


def test_curriculum_is_the_papers_probability_to_keep() -> None:
    """keep(t) = (1 - q) exp(-gamma t) + q, gamma = 10 / T, q the probability at the end; written out slowly."""
    total, p = 200, 0.3
    for step in range(total + 1):
        q, keep = 1 - p, 1.0
        keep = (1 - q) * torch.exp(torch.tensor(-10 / total * step, dtype=torch.float64)).item() + q
        assert p * curriculum()(step, total) == pytest.approx(1 - keep, abs=1e-12)
    assert curriculum()(0, total) == 0 and curriculum(gamma=0.0)(total, total) == 0
    with pytest.raises(ValueError, match="gamma"):
        curriculum(gamma=-1.0)


def test_attention_probabilities_are_dropped_under_compilation_without_compiling_again() -> None:
    tiny = build("llama")
    model = without_dropout(tiny.model).train()
    inputs = {**tiny.inputs, "use_cache": False}
    eager = model(**inputs)[0]
    patch_model(model, "dynamic_dropout", p=0.5, schedule=linear(1.0, 0.0))
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    outputs = []
    for step in range(6):
        model_step(model, step, 5)
        outputs.append(compiled(**inputs)[0].detach())
    assert counter.frame_count <= 2
    assert not torch.allclose(outputs[0], outputs[1]) and torch.allclose(outputs[5], eager, atol=1e-5)
    unpatch_model(model)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_of_unit_vectors_is_attention(groups: int, masked: bool) -> None:
    """What compiled code computes, at rate 0, against the function itself; at a rate, against the slow loop."""
    module = build("llama").model.layers[0].self_attn
    module.num_key_value_groups = 4 // groups
    gate = PlaceGate(patch_settings(), "interface")
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, groups, 5, 8), torch.randn(2, groups, 5, 8)
    mask = torch.zeros(2, 1, 5, 5).masked_fill_(torch.ones(5, 5).triu(1).bool(), -1e9) if masked else None
    from transformers.models.llama.modeling_llama import eager_attention_forward as function

    kwargs = {"scaling": 0.3, "dropout": 0.9}
    gate.p = 0.0
    whole = function(module, query, key, value, mask, scaling=0.3)[0]
    assert torch.allclose(gate._attend(function, module, query, key, value, mask, kwargs)[0], whole, atol=1e-6)
    gate.p = 0.5
    dropped, weights = gate._attend(function, module, query, key, value, mask, kwargs)
    assert 0.3 < (weights[weights != 0].numel() / weights.numel()) / (0.6 if masked else 1) < 0.7
    for b in range(2):
        for h in range(4):
            slow = weights[b, h] @ value[b, h * groups // 4]
            assert torch.allclose(dropped[b, :, h], slow, atol=1e-5)


def patch_settings() -> Any:
    from hf_reg.patches import DynamicDropout

    return DynamicDropout(p=0.5)


def test_tlm_still_replaces_attention_dropout() -> None:
    for model_type in ("bert", "deberta-v2"):
        tiny = build(model_type)
        model = without_dropout(tiny.model).train()
        patch_model(model, "tlm", rate=0.0)
        for gate in gates(model):
            gate.active = True  # on, at rate 0
        plain = forward(model, tiny.inputs)[0]
        patch_model(model, "attention_dropout", p=0.5)
        assert torch.equal(plain, forward(model, tiny.inputs)[0]), model_type


@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize("patch", ["attention_dropout", "hidden_dropout"])
def test_baselines_equal_set_dropout(patch: str) -> None:
    kind = patch.partition("_")[0]
    for model_type in ("bert", "llama", "opt", "vit"):
        tiny = build(model_type)
        stock = copy.deepcopy(tiny.model)
        set_dropout(stock, **{kind: 0.35})
        patch_model(tiny.model, patch, p=0.35)
        outputs = []
        for model in (tiny.model, stock):
            reseed(0)
            outputs.append(forward(model.train(), tiny.inputs)[0])
        assert torch.allclose(*outputs, atol=1e-6), model_type


def test_refusals() -> None:
    llama = build("llama").model
    with pytest.raises(ValueError, match=r"none of its \d+ dropouts is of the chosen kind with a rate above 0"):
        patch_model(llama, "dynamic_dropout")
    with pytest.raises(ValueError, match="kinds='heads' is not known"):
        patch_model(llama, "dynamic_dropout", kinds="heads", p=0.1)
    with pytest.raises(ValueError, match="p=1.0 is out of range"):
        patch_model(llama, "dynamic_dropout", p=1.0)
    bert = set_dropout(build("bert").model, hidden=0.6).model
    with pytest.raises(ValueError, match=r"has rate 0.6; times the highest factor of the schedule \(2\)"):
        patch_model(bert, "dynamic_dropout", schedule=on_plateau())
    mamba = build("mamba").model
    with pytest.raises(ValueError, match="attention_dropout found nothing to patch in 'mamba'"):
        patch_model(mamba, "attention_dropout")
    flex = build("llama").model
    flex.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention has no dropout"):
        patch_model(flex, "attention_dropout")
    patch_model(bert, "hidden_dropout")
    with pytest.raises(ValueError, match=r"hidden_dropout holds the dropout of this model.*before patch_model"):
        set_dropout(bert, hidden=0.1)
    assert not seams(llama) and not seams(flex)


def test_layers_and_what_is_outside_of_them() -> None:
    sites = [site for site in find_dropouts(build("bert").model) if site.kind == "hidden"]
    assert [(site.path, site.layer, site.layers) for site in sites][:2] == [
        ("embeddings.dropout", 0, 2), ("encoder.layer.0.attention.output.dropout", 0, 2)
    ]  # fmt: skip
    model = patch_model(build("bert").model, "hidden_dropout", p=0.5, layers=[1])
    assert rates(model, "hidden") == [0.1, 0.1, 0.1, 0.5, 0.5]


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    )


ROWS = [{"input_ids": torch.arange(i, i + 8), "labels": torch.tensor(i % 2)} for i in range(8)]


def train(folder: Path, *, resume: bool = False, **arguments: Any) -> RegularizedTrainer:
    args = RegularizedTrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1, save_steps=3,
        report_to=[], disable_tqdm=True, seed=1, use_cpu=True, **arguments,
    )  # fmt: skip
    schedule = {"on_plateau": {"up": 1.5, "down": 0.5}}
    trainer = RegularizedTrainer(
        model=bert(), args=args, train_dataset=ROWS, eval_dataset=ROWS,
        patches={"dynamic_dropout": {"p": 0.3, "schedule": schedule}, "adaptive_dropout": {}},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return trainer


def test_a_resumed_run_has_the_factor_of_the_validation_losses_and_neftune_goes_beside(tmp_path: Path) -> None:
    whole = train(tmp_path, neftune_noise_alpha=5.0)
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    again = train(tmp_path, resume=True, neftune_noise_alpha=5.0)
    factors = [
        {gate.factor for gate in gates(one.model) if gate.patch.name == "dynamic_dropout"} for one in (whole, again)
    ]
    assert factors[0] == factors[1] == {on_plateau(up=1.5, down=0.5)(5, 6, losses[:5])} != {1.0}
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    plain = train(tmp_path / "plain")
    pairs = zip(whole.model.parameters(), plain.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs), "NEFTune's noise makes no difference"
