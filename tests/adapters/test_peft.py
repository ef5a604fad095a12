"""What PEFT users expect of a PEFT model, quantised bases, and what is refused, after which nothing has changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn

from hf_reg import BALoraConfig, SorsaConfig, get_regularized_peft_model
from hf_reg.adapters import linear, merge_adapter

from .models import VOCABULARY, adapted, build, config_of, inputs, logits, train


def test_it_is_the_class_that_peft_has_for_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    assert isinstance(model, PeftModelForCausalLM) and type(model).__name__ == "PeftModelForCausalLM"
    model.print_trainable_parameters()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert trained == 2 * sum(4 * (a + b + 1) for a, b in widths)  # r (in + out + 1), METHODS 4.1
    assert f"trainable params: {trained:,}" in capsys.readouterr().out


def test_several_adapters_each_act_alone() -> None:
    model = train(adapted("sorsa"))
    first = logits(model)
    get_regularized_peft_model(model, config_of("ba_lora", folded=True), "second")
    assert model.active_adapters == ["second"]
    torch.testing.assert_close(logits(model), logits(build()), atol=1e-5, rtol=1e-5)
    second = logits(train(model, rate=3e-2))
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(build()), atol=1e-5, rtol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), first, atol=1e-5, rtol=1e-5)
    model.delete_adapter("default")
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), second, atol=1e-5, rtol=1e-5)
    model.delete_adapter("second")
    for name, parameter in build().named_parameters():
        plain = "base_model.model." + name
        where = plain if plain in dict(model.named_parameters()) else plain.replace(".weight", ".base_layer.weight")
        torch.testing.assert_close(dict(model.named_parameters())[where], parameter, atol=1e-6, rtol=1e-5)


def test_peft_policy_for_fsdp_leaves_the_factors_in_the_unit_of_their_layer() -> None:
    def own_units(model: nn.Module) -> list[str]:
        policy = fsdp_auto_wrap_policy(model)
        return [name for name, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)]

    plain = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear"))
    assert any("lora_A" in name for name in own_units(plain))
    units = own_units(adapted())
    assert len(units) == 2 and not any("lora" in name for name in units)


def test_ddp_does_not_broadcast_the_frozen_start() -> None:
    model = adapted()
    starts = [name for name, _ in model.named_buffers() if name.endswith((".a", ".b", ".values"))]
    assert len(starts) == 3 * 14 and set(starts) == set(model._ddp_params_and_buffers_to_ignore)
    assert not any(name.endswith(tuple(starts)) for name in model.state_dict())


def test_a_stock_lora_model_can_take_one() -> None:
    torch.manual_seed(0)
    stock = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    wanted = logits(stock)
    model = get_regularized_peft_model(stock, SorsaConfig(r=4), "sorsa")
    assert model is stock and torch.equal(logits(model), logits(build()))
    model.set_adapter("default")
    assert torch.equal(logits(model), wanted)


def test_weighted_sums_are_exact() -> None:
    model = train(adapted("sorsa"))
    get_regularized_peft_model(model, config_of("ba_lora", r=3, target_modules=["q_proj", "up_proj"]), "second")
    train(model)
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "both")
    model.set_adapter("both")
    for layer in (m for m in model.modules() if isinstance(m, linear.SvdLinear)):
        parts = zip((0.5, -2.0), ("default", "second"), strict=True)
        wanted = sum(weight * layer.change(name) for weight, name in parts if name in layer.lora_A)
        torch.testing.assert_close(layer.change("both"), wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="SVD adapters are combined with 'cat' only"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "x", combination_type="ties_svd", density=0.5)
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        model.add_weighted_adapter(["default", "second"], [1.0], "x")
    with pytest.raises(ValueError, match="Unknown adapter 'third'"):
        model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "x")
    assert "x" not in model.peft_config


def test_weighted_sums_of_plain_adapters_are_those_of_peft() -> None:
    model = adapted()
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.add_weighted_adapter(["one", "other"], [0.5, 2.0], "joined", combination_type="cat")
    model.add_weighted_adapter(["one", "other"], [0.5, 2.0], "cut")  # PEFT's default: the SVD of their sum
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.r["joined"] == 4 and layer.r["cut"] == 2
    wanted = 0.5 * layer.change("one") + 2 * layer.change("other")
    torch.testing.assert_close(layer.change("joined"), wanted, atol=1e-5, rtol=1e-4)


def test_merging_says_what_it_changed() -> None:
    model = train(adapted(folded=True))
    wanted = logits(model)
    merged, report = merge_adapter(model)
    assert report.layers == 14 and report.relative < 1e-5 and report.agreement == 1.0
    assert "largest change of a logit" in str(report)
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=1e-5)


def test_a_merge_that_loses_the_adapter_is_undone() -> None:
    model = get_regularized_peft_model(build().to(torch.bfloat16), config_of("sorsa"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.001)
    wanted = logits(model)
    with pytest.raises(
        ValueError, match=r"Merging changed a logit by .* where 1e-06 is accepted \(torch.bfloat16 lost"
    ):
        merge_adapter(model, inputs(), tolerance=1e-6)
    assert torch.equal(logits(model), wanted) and not any(getattr(m, "merged", False) for m in model.modules())
    with pytest.raises(TypeError, match="expected a PeftModel"):
        merge_adapter(build())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        merge_adapter(model)
    with pytest.raises(ValueError, match="Pass probe="):
        merge_adapter(adapted("sorsa", "t5"))


# quantised bases: the stub quantises as bitsandbytes does, to rows of int8 with a scale


class Quantised(nn.Linear):
    """A linear layer whose weight is kept in int8, as a stand-in for those of bitsandbytes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.bias = layer.bias
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def dequantised(self) -> torch.Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantised(), self.bias)


def quantised() -> nn.Module:
    model = build()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child is not model.lm_head:
                setattr(module, name, Quantised(child))
    return model


def test_quantised_bases_are_decomposed_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "dequantize_module_weight", lambda layer: layer.dequantised())
    bare = quantised()
    weight = bare.model.layers[0].mlp.up_proj.dequantised()
    wanted = logits(bare)
    model = get_regularized_peft_model(bare, config_of("sorsa"))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(layer.lora_S["default"].detach(), values[:4], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), wanted) and layer.get_base_layer().weight.dtype == torch.int8
    train(model)
    assert not torch.allclose(logits(model), wanted, atol=1e-2)
    with pytest.raises(ValueError, match=r"base weight is quantised \(torch.int8\).*merge it into the model in bf16"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"folded=True would write into .* quantised \(torch.int8\).*folded=False"):
        get_regularized_peft_model(quantised(), config_of("sorsa", folded=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(  # bitsandbytes quantises blocks of 64
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    settings = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.float32)

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=settings, device_map="cpu"
        ).eval()

    bare = load()
    wanted = logits(bare)  # the first forward moves the scales of 8-bit weights
    model = get_regularized_peft_model(bare, config_of("sorsa"))
    assert torch.equal(logits(model), wanted)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load(), str(tmp_path / "adapter")).eval()
    difference = (logits(stock) - logits(model)).abs().max()  # the 4-bit kernels of a CPU differ after training
    assert difference < (1e-4 if bits == 8 else 0.05 * (logits(model) - wanted).abs().max())
    with pytest.raises(ValueError, match="base weight is quantised"):
        model.merge_adapter()


# refusals


def refused(model: nn.Module, config: Any, error: type[Exception], text: str) -> None:
    """`get_regularized_peft_model` raises, and `model` is as it was."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(error, match=text):
        get_regularized_peft_model(model, config)
    assert [type(module) for module in model.modules()] == kinds
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) or tensor.isnan().any() for name, tensor in model.state_dict().items())


def test_what_cannot_be_decomposed_leaves_the_model_as_it_was() -> None:
    refused(build(), config_of("sorsa", target_modules=["q_proj", "embed_tokens"]), ValueError, "embed_tokens")
    refused(build(), config_of("sorsa", r=17), ValueError, r"rank 17 .* expected 1 to 16. Lower r for this layer")
    broken = build()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    refused(broken, config_of("ba_lora"), ValueError, r"layers.1.mlp.down_proj.*not finite")
    refused(build(), LoraConfig(), TypeError, "expected SorsaConfig, BALoraConfig or the folder of a saved adapter")
    with torch.device("meta"):
        placeholder = transformers.LlamaForCausalLM(build().config)
    with pytest.raises(ValueError, match="has no values yet. Load the weights before"):
        get_regularized_peft_model(placeholder, config_of("sorsa"))


def test_folding_into_a_shared_weight_is_refused() -> None:
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    tied = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**settings, intermediate_size=48, tie_word_embeddings=True)
    )
    refused(tied, config_of("sorsa", target_modules=["lm_head"], folded=True), ValueError, "share. Use folded=False")


def test_an_old_peft_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.__version__", "0.18.1")
    with pytest.raises(ImportError, match=r"needs peft >= 0.19, found 0.18.1: pip install -U peft"):
        SorsaConfig()


def test_peft_alone_does_not_make_one() -> None:
    model = get_peft_model(build(), SorsaConfig(r=4))
    with pytest.raises(RuntimeError, match="never initialised: add it with hf_reg.get_regularized_peft_model"):
        logits(model)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"use_dora": True}, "use_dora cannot be combined"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights cannot be combined"),
        ({"use_rslora": True}, "lora_alpha is None. Give it"),
        ({"r": 0}, "r=0; expected an integer of at least 1"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern\['q_proj'\]=2.5; expected an integer"),
        ({"lora_alpha": -1}, "lora_alpha=-1; expected a positive number"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is given, but lora_alpha is None"),
        ({"svd_tolerance": 0}, "svd_tolerance=0"),
        ({"gamma": -1.0}, "gamma=-1.0; expected a finite number"),
        ({"orthonormality": "couple"}, "orthonormality.*coupled"),
        ({"reduction": "max"}, "reduction.*sum"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SorsaConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "task_type=None does not say which form"),
        ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS' does not say which form"),
        ({"form": "nlq"}, "form.*nlg"),
        ({"form": "nlg", "lambdas": [1.0]}, "expected three weights"),
        ({"form": "nlg", "lambdas": [1.0, -1.0, 0.0]}, "-1.0"),
        ({"form": "nlu", "top_k": 5}, "has no use in 'nlu'"),
        ({"form": "nlg", "k": 0}, "k=0"),
        ({"form": "nlg", "temperature": 0.0}, "temperature=0.0"),
        ({"form": "nlg", "version": "v7"}, "version.*iclr2026"),
    ],
    ids=str,
)
def test_settings_of_ba_lora_out_of_range_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BALoraConfig(**settings)
