"""set_dropout: what is set where, what really drops, and that nothing is left of it at 0."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertForMultipleChoice, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_reg import patch_model, unpatch_model
from hf_reg.dropout import AddedDropout, DropoutReport, set_dropout
from hf_reg.patching import unwrap

from .architectures import Tiny, build, forward


# Two layers each: places of attention, hidden, ffn; which kinds are added; the configuration fields of each
MODELS: dict[str, tuple[tuple[int, int, int], set[str], dict[str, str]]] = {
    "bert": ((2, 5, 2), {"ffn"}, {"attention_probs_dropout_prob": "attention", "hidden_dropout_prob": "hidden"}),
    "gpt2": ((2, 5, 2), {"ffn"}, {"attn_pdrop": "attention", "resid_pdrop": "hidden", "embd_pdrop": "hidden"}),
    "opt": ((2, 2, 2), {"ffn"}, {"attention_dropout": "attention", "dropout": "hidden"}),
    "t5": ((6, 12, 4), set(), {}),
    "bart": (
        (6, 6, 4), set(),
        {"attention_dropout": "attention", "dropout": "hidden", "activation_dropout": "ffn"},
    ),
    "llama": ((2, 4, 2), {"hidden", "ffn"}, {"attention_dropout": "attention"}),
    "mistral": ((2, 4, 2), {"hidden", "ffn"}, {"attention_dropout": "attention"}),
    "qwen3": ((2, 4, 2), {"hidden", "ffn"}, {"attention_dropout": "attention"}),
    "gemma3_text": ((2, 4, 2), {"hidden", "ffn"}, {"attention_dropout": "attention"}),
    "modernbert": (
        (2, 5, 2), {"hidden"},
        {"attention_dropout": "attention", "embedding_dropout": "hidden", "mlp_dropout": "ffn"},
    ),
    "vit": ((2, 3, 2), {"ffn"}, {"attention_probs_dropout_prob": "attention", "hidden_dropout_prob": "hidden"}),
}  # fmt: skip
RATES = {"attention": 0.2, "hidden": 0.3, "ffn": 0.4}
KINDS = tuple(RATES)


def run(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return forward(model, inputs)  # type: ignore[arg-type]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed call must leave alone."""
    rates = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) in (int, float)
    }
    return {"rates": rates, "modules": [p for p, _ in model.named_modules()], "hooks": hooks(model),
            "config": json.dumps(model.config.to_dict(), default=str), "training": [m.training for m in model.modules()]}  # type: ignore  # fmt: skip  # noqa: E501


@pytest.fixture
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return build(request.param)


@pytest.mark.parametrize("tiny", MODELS, indirect=True)
def test_every_kind_is_set_and_seen_to_drop(tiny: Tiny) -> None:
    counts, added, fields = MODELS[tiny.model_type]
    report = set_dropout(tiny.model, **RATES)
    assert all(row.rate == RATES[row.kind] and row.dropped is None for row in report.rows)
    assert {row.kind for row in report.rows if row.how == "added"} == added
    verified = report.verify(**tiny.inputs)
    assert verified.dropped == {kind: (count, count) for kind, count in zip(KINDS, counts, strict=True)}
    for name, kind in fields.items():
        assert getattr(tiny.model.config, name) == RATES[kind], name
    assert not report.uncovered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiny", MODELS, indirect=True)
def test_one_kind_alone(tiny: Tiny, kind: str) -> None:
    """Evaluation as before, training not, stock checkpoint, copies of their own; and at 0 nothing is left."""
    model, inputs = tiny.model, tiny.inputs
    set_dropout(model, **dict.fromkeys(KINDS, 0.0))
    modules, hooked, keys = [p for p, _ in model.named_modules()], hooks(model), list(model.state_dict())
    assert not any(isinstance(m, AddedDropout) for m in model.modules())
    plain = run(model.eval(), inputs)
    still = run(model.train(), inputs)
    report = set_dropout(model, **{kind: 0.3})
    assert list(model.state_dict()) == keys
    model.eval()
    state = torch.get_rng_state()
    with torch.no_grad():  # with gradients T5's attention takes another kernel
        assert equal(plain, forward(model, inputs)) and torch.equal(state, torch.get_rng_state())
    noisy = run(model.train(), inputs)
    assert not equal(still, noisy) and not equal(noisy, run(model, inputs, 1))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal(noisy, run(twin, inputs))
        set_dropout(twin, **{kind: 0.0})
        assert equal(still, run(twin, inputs)) and hooks(twin) == hooked
    assert equal(noisy, run(model, inputs))
    for row in report.rows:  # what TRL's disable_dropout does
        if row.how != "number":
            model.get_submodule(row.path).p = 0  # type: ignore[assignment]
    assert equal(still, run(model, inputs)) or any(row.how == "number" for row in report.rows)
    set_dropout(model, **{kind: 0.0})
    assert equal(still, run(model, inputs)) and hooks(model) == hooked
    assert [p for p, _ in model.named_modules()] == modules


def test_added_dropout_is_dropout_on_the_branches_before_the_residual() -> None:
    """Against the model written out: Llama's layer with dropout on both branches and on the activation."""
    tiny = build("llama")
    model, layer = tiny.model, tiny.model.layers[0]
    set_dropout(model, hidden=0.3, ffn=0.4)
    seen: dict[str, torch.Tensor] = {}
    for name, part in {
        "o_proj": layer.self_attn.o_proj,
        "norm": layer.post_attention_layernorm,
        "down": layer.mlp.down_proj,
    }.items():
        part.register_forward_hook(lambda m, a, o, name=name: seen.update({f"{name}.in": a[0], f"{name}.out": o}))
    layer.register_forward_hook(lambda m, a, o: seen.update(layer_in=a[0], layer_out=o))
    run(model, tiny.inputs)
    branch = seen["norm.in"] - seen["layer_in"]
    kept = branch.abs() > 1e-7
    assert 0.6 < kept.float().mean() < 0.8
    torch.testing.assert_close(branch[kept], seen["o_proj.out"][kept] / 0.7, rtol=1e-3, atol=1e-6)
    branch = seen["layer_out"] - seen["norm.in"]
    kept = branch.abs() > 1e-7
    torch.testing.assert_close(branch[kept], seen["down.out"][kept] / 0.7, rtol=1e-3, atol=1e-6)
    assert 0.5 < (seen["down.in"] != 0).float().mean() < 0.7


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, gradients = build("llama").model, []
    inputs = build("llama").inputs
    set_dropout(model, attention=0.2, hidden=0.3, ffn=0.4)
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs, use_cache=False).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert equal(*gradients) and len(gradients[0]) > 10


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_verify_sees_both_attention_kernels(attention: str) -> None:
    tiny = build("llama", attn_implementation=attention)
    assert set_dropout(tiny.model, attention=0.2).verify(**tiny.inputs).dropped == {"attention": (2, 2)}


def test_verify_leaves_no_trace() -> None:
    tiny = build("bart")
    tiny.model.eval()
    tiny.model.encoder.layers[0].train()
    report = set_dropout(tiny.model, **RATES)
    before, state, numpy_state = snapshot(tiny.model), torch.get_rng_state(), np.random.get_state()[1].copy()
    report.verify(**tiny.inputs)
    with pytest.raises(ValueError, match="input_ids"):
        report.verify()
    assert snapshot(tiny.model) == before
    assert torch.equal(state, torch.get_rng_state()) and (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize(
    "switch_off",
    [
        lambda layer: setattr(layer.self_attn, "attention_dropout", 0.0),
        lambda layer: setattr(layer.mlp.get_submodule("hf_reg_hidden"), "p", 0.0),
        lambda layer: layer.mlp.down_proj._forward_pre_hooks.clear(),
        lambda layer: delattr(layer.self_attn, "hf_reg_hidden") or layer.self_attn._forward_hooks.clear(),
    ],
)
def test_verify_names_the_place_that_does_not_drop(switch_off: Any) -> None:
    tiny = build("llama")
    report = set_dropout(tiny.model, attention=0.1, hidden=0.1, ffn=0.1)
    switch_off(tiny.model.layers[1])
    with pytest.raises(RuntimeError, match=r"1 places .*did not drop: layers\.1\..*Dropped: "):
        report.verify(**tiny.inputs)


def test_verify_tells_equal_rates_apart() -> None:
    """BART's layer passes two numbers to the same function: the one that is not used is named."""
    tiny = build("bart")
    report = set_dropout(tiny.model, hidden=0.1, ffn=0.1)
    tiny.model.encoder.layers[1].activation_dropout = 0.0
    with pytest.raises(RuntimeError, match=r"1 places .*encoder\.layers\.1\.activation_dropout \(ffn"):
        report.verify(**tiny.inputs)


def test_verify_finds_attention_code_that_ignores_its_own_setting() -> None:
    tiny = build("falcon")  # passes 0.0 to scaled_dot_product_attention, whatever its attention_dropout
    with pytest.raises(RuntimeError, match="attention 0 of 2"):
        set_dropout(tiny.model, attention=0.1).verify(**tiny.inputs)


def test_verify_counts_no_call_outside_training() -> None:
    tiny = build("bert")
    report = set_dropout(tiny.model, hidden=0.1)
    stuck = tiny.model.embeddings.dropout.eval()
    stuck.train = lambda mode=True: stuck
    with pytest.raises(RuntimeError, match=r"1 places .*embeddings\.dropout.*hidden 4 of 5"):
        report.verify(**tiny.inputs)


def test_verify_restores_numpy_for_models_that_draw_from_it() -> None:
    tiny = build("wav2vec2")  # SpecAugment
    report = set_dropout(tiny.model, hidden=0.1)
    before = np.random.get_state()
    report.verify(**tiny.inputs)
    assert all(np.array_equal(a, b) for a, b in zip(before, np.random.get_state(), strict=True))
    tiny.model.train()(**tiny.inputs)
    assert not all(np.array_equal(a, b) for a, b in zip(before, np.random.get_state(), strict=True))


def test_one_module_in_both_positions_counts_as_residual() -> None:
    report = set_dropout(build("xlnet").model, hidden=0.1, ffn=0.2)  # its FFN calls one dropout twice
    assert {row.kind for row in report.rows if row.path.endswith("ff.dropout")} == {"hidden"}


def test_again_replaces() -> None:
    tiny = build("qwen3")
    set_dropout(tiny.model, hidden=0.1, ffn=0.2)
    before = hooks(tiny.model)
    report = set_dropout(tiny.model, hidden=0.5)
    assert hooks(tiny.model) == before and {0.2, 0.5} == {
        m.p for m in tiny.model.modules() if isinstance(m, AddedDropout)
    }
    assert [row.rate for row in report.rows] == [0.5] * 4
    assert report.verify(**tiny.inputs).dropped == {"hidden": (4, 4)}


def test_a_shared_configuration_field_is_written_when_its_kinds_agree() -> None:
    model = build("t5").model
    before = model.config.dropout_rate
    set_dropout(model, attention=0.3)
    assert model.config.dropout_rate == before
    set_dropout(model, hidden=0.2, ffn=0.4)
    assert model.config.dropout_rate == before
    set_dropout(model, hidden=0.3, ffn=0.3)
    assert (model.config.dropout_rate, model.encoder.config.dropout_rate) == (0.3, 0.3)


def test_layerdrop_and_the_head_are_left_alone() -> None:
    tiny = build("bart")
    tiny.model.config.encoder_layerdrop = tiny.model.encoder.layerdrop = 0.05
    set_dropout(tiny.model, attention=0.3, hidden=0.3, ffn=0.3)
    assert tiny.model.encoder.layerdrop == tiny.model.config.encoder_layerdrop == 0.05
    for head in (BertForSequenceClassification, BertForMultipleChoice):
        model = head(build("bert").model.config)
        before = model.dropout.p
        report = set_dropout(model, hidden=0.35)
        assert model.dropout.p == before != 0.35 and model.bert.embeddings.dropout.p == 0.35
        assert all(row.path.startswith("bert.") for row in report.rows)


def test_layerdrop_does_not_fool_verify() -> None:
    tiny = build("bart")
    tiny.model.encoder.layerdrop = 0.2
    for seed in range(3):
        torch.manual_seed(seed)
        set_dropout(tiny.model, hidden=0.3).verify(**tiny.inputs)


def test_fused_experts() -> None:
    model = build("mixtral").model
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"ffn=0.1: MixtralModel has no place .*2 x MixtralExperts.*leave this kind"):
        set_dropout(model, ffn=0.1, hidden=0.1)
    assert snapshot(model) == before
    tiny = build("qwen3_next")  # a shared expert of plain layers beside the fused ones, and linear attention
    report = set_dropout(tiny.model, attention=0.1, hidden=0.1, ffn=0.1)
    assert report.uncovered == {
        "attention": {"Qwen3NextGatedDeltaNet": 1},
        "hidden": {"Qwen3NextGatedDeltaNet": 1},
        "ffn": {"Qwen3NextExperts": 2},
    }
    assert [row.path for row in report.rows if row.kind == "ffn"] == [
        f"layers.{i}.mlp.shared_expert.down_proj.hf_reg_ffn" for i in range(2)
    ]
    assert "Not covered, ffn: 2 x Qwen3NextExperts." in str(report.verify(**tiny.inputs))


def test_beside_patches() -> None:
    """A patch's gates are dropout modules too, and not ours; taking patches off leaves our hooks."""
    tiny = build("deberta-v2")
    patch_model(tiny.model, "drophead", p=0.4)
    report = set_dropout(tiny.model, **RATES)
    assert not any("hf_reg." in row.path for row in report.rows)
    report.verify(**tiny.inputs)
    unpatch_model(tiny.model)
    assert report.verify(**tiny.inputs).dropped == {"attention": (2, 2), "hidden": (5, 5), "ffn": (2, 2)}


# LoRA


def lora_llama(rate: float = 0.0) -> tuple[Any, dict[str, Any]]:
    tiny = build("llama")
    causal = LlamaForCausalLM(LlamaConfig(**tiny.model.config.to_diff_dict()))
    config = LoraConfig(
        r=2, lora_dropout=rate, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(causal, config), tiny.inputs


@pytest.mark.parametrize("start", [0.0, 0.1])
def test_lora(start: float) -> None:
    model, inputs = lora_llama(start)
    keys = list(model.state_dict())
    plain = run(model.eval(), inputs)
    report = set_dropout(model, lora=0.3)
    assert report.verify(**inputs).dropped == {"lora": (4, 4)}
    assert model.peft_config["default"].lora_dropout == 0.3 and list(model.state_dict()) == keys
    assert equal(plain, run(model, inputs))
    noisy = run(model.train(), inputs)
    assert not equal(plain, noisy) and equal(noisy, run(pickle.loads(pickle.dumps(model)), inputs))
    set_dropout(model, lora=0.0)
    assert equal(plain, run(model, inputs)) and model.peft_config["default"].lora_dropout == 0.0
    entry = unwrap(model).model.layers[0].self_attn.q_proj.lora_dropout["default"]  # type: ignore[union-attr]
    assert type(entry) is nn.Identity


def test_all_kinds_on_a_lora_model() -> None:
    model, inputs = lora_llama()
    report = set_dropout(model, attention=0.1, hidden=0.1, ffn=0.1, lora=0.1)
    counts = {"attention": (2, 2), "hidden": (4, 4), "ffn": (2, 2), "lora": (4, 4)}
    assert report.verify(**inputs).dropped == counts
    down = unwrap(model).model.layers[0].mlp.down_proj  # type: ignore[union-attr]
    assert isinstance(down.hf_reg_ffn, AddedDropout)  # before the adapter and the base layer, not inside one of them
    again = set_dropout(model, hidden=0.2)
    assert again.verify(**inputs).dropped == {"hidden": (4, 4)}


def test_adapter_put_on_after_the_dropout_is_covered_by_a_second_call() -> None:
    tiny = build("llama")
    set_dropout(tiny.model, ffn=0.3)
    model = get_peft_model(tiny.model, LoraConfig(r=2, target_modules=["down_proj"]))
    report = set_dropout(model, ffn=0.3)
    assert sum(isinstance(m, AddedDropout) for m in model.modules()) == len(report.rows) == 2
    report.verify(**tiny.inputs)


# what is refused, and what is shown


@pytest.mark.parametrize(
    ("rates", "error", "message"),
    [
        ({}, ValueError, "no rate"),
        ({"hidden": 1.0}, ValueError, r"hidden=1.0 is out of range; give 0 <= hidden < 1"),
        ({"hidden": 0.1, "ffn": -0.1}, ValueError, "ffn=-0.1 is out of range"),
        ({"attention": "some"}, TypeError, "attention must be a number, got 'some'"),
        ({"attention": True}, TypeError, "attention must be a number"),
        ({"hidden": 0.1, "lora": 0.1}, ValueError, "lora=0.1: LlamaModel has no place.*get_peft_model first"),
    ],
)
def test_refused(rates: dict[str, Any], error: type[Exception], message: str) -> None:
    model = build("llama").model
    before = snapshot(model)
    with pytest.raises(error, match=message):
        set_dropout(model, **rates)
    assert snapshot(model) == before


def test_refused_models() -> None:
    with pytest.raises(ValueError, match=r"attention=0.1: BitModel has no place"):
        set_dropout(build("bit").model, attention=0.1)
    with pytest.raises(TypeError, match="Expected a model"):
        set_dropout("llama", hidden=0.1)  # type: ignore[arg-type]
    model = build("llama").model
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention has no dropout"):
        set_dropout(model, attention=0.1)


def test_shown() -> None:
    tiny = build("bert")
    report = set_dropout(tiny.model, attention=0.2, hidden=0.0)
    assert isinstance(report, DropoutReport)
    text = str(report)
    assert "Dropout of BertModel" in text and "encoder.layer.0.attention.self.dropout" in text
    assert "not verified" in text and "off" in text
    verified = report.verify(**tiny.inputs)
    assert "2 / 2" in str(verified) and "<pre>" in verified._repr_html_()


def test_rates_that_no_code_reads_and_names_that_mislead() -> None:
    paths = [row.path for row in set_dropout(build("opt").model, hidden=0.1).rows]
    assert "decoder.dropout" not in paths  # OPT's decoder stores the number and never uses it
    tiny = build("recurrent_gemma")  # RecurrentGemmaMlp mixes no tokens, whatever its name
    assert set_dropout(tiny.model, ffn=0.1).verify(**tiny.inputs).dropped["ffn"][0] > 0
