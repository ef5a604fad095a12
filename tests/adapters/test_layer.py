"""What an adapted layer computes: the definition in float64, step 0, adapter off, merging, half precision."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_reg import BALoraConfig, SorsaConfig, get_regularized_peft_model
from hf_reg.adapters.linear import SvdLinear

from .models import FAMILIES, METHODS, adapted, build, config_of, inputs, logits, train


class One(nn.Module):
    """A single linear layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def reference(x: torch.Tensor, weight: torch.Tensor, bias: Any, own: list, start: list, scale: float) -> torch.Tensor:
    """METHODS 4.1, materialised: y = W x + s (B diag(S) A - B_0 diag(S_0) A_0) x + bias, in float64."""
    (a, b, s), (a0, b0, s0) = own, start
    change = b @ torch.diag(s) @ a - b0 @ torch.diag(s0) @ a0
    y = x @ (weight + scale * change).T
    return y if bias is None else y + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("alpha", [None, 6])
@pytest.mark.parametrize("method", METHODS)
def test_forward_and_gradients_are_those_of_the_definition(
    method: str, alpha: int | None, folded: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    bare = One(bias)
    weight = bare.linear.weight.detach().double()
    settings: dict[str, Any] = {"r": 3, "lora_alpha": alpha, "target_modules": ["linear"], "folded": folded}
    config = SorsaConfig(**settings) if method == "sorsa" else BALoraConfig(form="nlg", **settings)
    model = get_regularized_peft_model(bare, config)
    layer = next(m for m in model.modules() if isinstance(m, SvdLinear))
    scale = 1.0 if alpha is None else alpha / 3
    u, s, vh = torch.linalg.svd(weight)
    own = layer.parameters_of("default")
    ones = torch.ones(3, dtype=torch.float64)
    first = [tensor.detach().double().clone() for tensor in (own["lora_A"], own["lora_B"])]
    first.append(own["lora_S"].detach().double().clone() if method == "sorsa" else ones)
    product = first[1] @ torch.diag(first[2]) @ first[0]
    best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
    torch.testing.assert_close(product * (1.0 if method == "sorsa" else scale), best, atol=1e-5, rtol=1e-5)
    if method == "sorsa":
        torch.testing.assert_close(first[2], s[:3], atol=1e-5, rtol=1e-5)

    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(2, 5, 12, requires_grad=True)
    wide = [own[name].detach().double().requires_grad_() for name in own]
    moved = [*wide, ones] if method == "ba_lora" else wide
    x64 = x.detach().double().requires_grad_()
    wanted = reference(x64, weight, bare.linear.bias.detach().double() if bias else None, moved, first, scale)
    found = model(x)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    found.sin().sum().backward()
    wanted.sin().sum().backward()
    for name, tensor in zip(own, wide, strict=True):
        torch.testing.assert_close(own[name].grad.double(), tensor.grad, atol=1e-4, rtol=1e-4, msg=name)
    torch.testing.assert_close(x.grad.double(), x64.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_starts_at_the_pretrained_model(method: str, family: str) -> None:
    bare = build(family)
    wanted = logits(bare, family)
    state = {name: tensor.clone() for name, tensor in bare.state_dict().items()}
    model = get_regularized_peft_model(bare, config_of(method, family))
    if family != "bert":  # whose classifier is trained, a copy of its own
        for name, tensor in model.state_dict().items():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert plain not in state or torch.equal(tensor, state[plain])
    assert torch.equal(logits(model, family), wanted)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), wanted)
    train(model, family)
    assert not torch.allclose(logits(model, family), wanted, atol=1e-2)
    if family != "bert":
        with model.disable_adapter():
            assert torch.equal(logits(model, family), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_folded_starts_at_the_pretrained_model_to_rounding(method: str, family: str) -> None:
    wanted = logits(build(family), family)
    model = adapted(method, family, folded=True)
    torch.testing.assert_close(logits(model, family), wanted, atol=1e-5, rtol=1e-5)
    default = train(adapted(method, family), family)
    train(model, family)
    torch.testing.assert_close(logits(model, family), logits(default, family), atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, family), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_unmerged(method: str, family: str, folded: bool) -> None:
    model = train(adapted(method, family, folded=folded), family)
    wanted = logits(model, family)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, family), wanted, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, family), wanted, atol=1e-5, rtol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged, family), wanted, atol=1e-5, rtol=1e-5)
    if family != "bert":
        torch.testing.assert_close(logits(model.unload(), family), logits(build(family), family), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_get_factors_in_fp32(dtype: torch.dtype) -> None:
    bare = build().to(dtype)
    wanted = logits(bare)
    model = get_regularized_peft_model(bare, config_of("sorsa"))
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32} and torch.equal(logits(model), wanted)
    train(model, steps=2)
    assert logits(model).isfinite().all() and not torch.equal(logits(model), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(**inputs()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


def test_adapter_in_half_precision_starts_exactly_too() -> None:
    model = adapted().to(torch.bfloat16)
    assert torch.equal(logits(model), logits(build().to(torch.bfloat16)))


def test_dropout_is_that_of_the_adapter_and_cancels_at_the_start() -> None:
    model = adapted(lora_dropout=0.5).train()
    assert torch.equal(model(**inputs()).logits, model(**inputs()).logits)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    assert not torch.equal(model(**inputs()).logits, model(**inputs()).logits)


@pytest.mark.parametrize("method", METHODS)
def test_every_factor_gets_a_gradient_and_checkpointing_keeps_it(method: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = train(adapted(method), steps=1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**inputs()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in plain.values())
    torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("folded", [False, True])
def test_compiles_in_one_graph(folded: bool) -> None:
    model = train(adapted(folded=folded), steps=1)
    wanted = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs()).logits, wanted)
    model.train()
    compiled(**inputs()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_copies_and_pickles_run_their_own_weights() -> None:
    model = train(adapted("ba_lora", folded=True))
    wanted = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and torch.equal(logits(other), wanted)
        train(other)
        assert not torch.equal(logits(other), wanted) and torch.equal(logits(model), wanted)


def test_no_matrix_of_the_size_of_a_weight_is_made_in_training() -> None:
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(256, 192))
    model = get_regularized_peft_model(bare, SorsaConfig(r=4, target_modules=["0"]))
    x = torch.randn(8, 256, requires_grad=True)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 8 * 192 * 4 <= largest < 192 * 256 * 4


def test_plain_lora_beside_an_svd_adapter_is_plain_lora() -> None:
    stock = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    torch.manual_seed(0)
    model = adapted()
    model.add_adapter("plain", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            model.get_parameter(name.replace(".default.", ".plain.")).data.copy_(parameter)
    model.set_adapter("plain")
    assert torch.equal(logits(model), logits(stock))
