"""Standout against a slow loop, its means, and where it finds pre-activations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_reg import describe, patch_model, unpatch_model
from hf_reg.patches.standout import keep_probability
from hf_reg.seams.attention import gates, seams

from .architectures import build, forward
from .properties import same, without_dropout


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_equals_the_slow_loop(p: float) -> None:
    z = torch.randn(3, 7) * 3
    found = keep_probability(z, p, 1.5, -0.5)
    for row, wanted in zip(z.tolist(), found.tolist(), strict=True):
        for value, keep in zip(row, wanted, strict=True):
            belief = 1 / (1 + math.exp(-(1.5 * value - 0.5)))
            assert keep == pytest.approx(1 - p * (1 - belief), abs=1e-6)
    if p == 1.0:
        assert torch.allclose(found, torch.sigmoid(1.5 * z - 0.5), atol=1e-6)


def gate_of(model: Any) -> Any:
    return next(iter(gates(model)))


def test_mean_over_draws_is_the_activation_and_units_are_kept_by_their_pre_activation() -> None:
    model = patch_model(build("llama").model.train(), "standout", p=0.8, alpha=2.0, beta=0.3)
    gate = gate_of(model)
    z, h = torch.randn(1, 16), torch.randn(1, 16)
    gate.seen = z.expand(20_000, -1)
    out = gate.transform(h.expand(20_000, -1))
    assert (out.mean(0) - h[0]).abs().max() < 0.1  # four standard errors of the worst unit
    kept = (out != 0).float().mean(0)
    assert (kept - keep_probability(z[0], 0.8, 2.0, 0.3)).abs().max() < 0.02
    assert out.abs().max() <= h.abs().max() / (1 - 0.8) + 1e-5


def test_no_gradient_goes_through_the_probability() -> None:
    model = patch_model(build("llama").model.train(), "standout", p=0.5)
    gate = gate_of(model)
    z, h = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    gate.seen = z
    out = gate.transform(h)
    out.sum().backward()
    assert z.grad is None
    torch.testing.assert_close(h.grad, out.detach() / h.detach())


@pytest.mark.parametrize(
    ("model_type", "projection", "half"),
    [("llama", "gate_proj", False), ("bert", "intermediate.dense", False), ("phi3", "gate_up_proj", True),
     ("modernbert", "Wi", True), ("t5", "wi", False), ("mixtral", "", False), ("mgp-str", "fc1", False)],
)  # fmt: skip
def test_the_pre_activation_is_that_of_the_activated_half(model_type: str, projection: str, half: bool) -> None:
    tiny = build(model_type)
    model = patch_model(without_dropout(tiny.model).train(), "standout", p=0.5)
    gate, seen, given, found = gate_of(model), [], [], []
    transform = gate.transform

    def spy(states: torch.Tensor) -> torch.Tensor:
        seen.append(gate.seen)
        given.append(states)
        found.append(transform(states))
        return found[-1]

    gate.transform = spy
    activation: list[torch.Tensor] = []
    for module in model.modules():
        if "activation" in type(module).__name__.lower() or type(module).__name__ in ("SiLU", "GELU", "ReLU"):
            module.register_forward_pre_hook(lambda m, a: activation.append(a[0]))
    forward(tiny, tiny.inputs)
    assert seen and gate.seen is None
    z = seen[0].chunk(2, dim=gate.dim)[0] if half else seen[0]
    assert z.shape == given[0].shape and torch.equal(z, activation[0])
    keep = keep_probability(z, 0.5, 1.0, 0.0)
    stays = found[0] != 0
    assert 0.1 < 1 - stays[given[0] != 0].float().mean() < 0.5  # ReLU gives zeros of its own
    torch.testing.assert_close(found[0][stays], (given[0] / keep)[stays])


@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_follows_an_adapter_on_the_up_projection(first: str) -> None:
    tiny = build("llama")
    config = LoraConfig(target_modules=["gate_proj"], r=2, init_lora_weights=False)
    model: Any = tiny.model
    if first == "patch":
        model = get_peft_model(patch_model(model, "standout", p=0.5), config)
    else:
        model = patch_model(get_peft_model(model, config), "standout", p=0.5)
    outputs: list[torch.Tensor] = []
    layer = model.base_model.model.layers[0].mlp
    layer.gate_proj.register_forward_hook(lambda m, a, o: outputs.append(o))
    gate, seen = gate_of(model), []
    transform = gate.transform
    gate.transform = lambda states: (seen.append(gate.seen), transform(states))[1]
    model.train()(**tiny.inputs)
    assert torch.equal(seen[0], outputs[0])
    del gate.transform
    unpatch_model(model)
    assert not seams(model) and not any(
        type(hook).__module__.startswith("hf_reg") for m in model.modules()
        for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )  # fmt: skip


def test_expectation_in_evaluation_as_in_the_paper() -> None:
    tiny = build("llama")
    model = without_dropout(tiny.model).eval()
    stock = forward(model, tiny.inputs)
    patch_model(model, "standout", p=1.0, expectation="test")
    gate = gate_of(model)
    z, h = torch.randn(3, 8), torch.randn(3, 8)
    gate.seen = z
    torch.testing.assert_close(gate.transform(h), h * torch.sigmoid(z))
    state = torch.get_rng_state()
    assert not same(stock, forward(model, tiny.inputs)) and torch.equal(state, torch.get_rng_state())
    [row] = describe(model).rows  # type: ignore[attr-defined]
    assert row.now == "1, in evaluation too" and "keep probability" in row.notes
    model.train()
    gate.seen = z
    out = gate.transform(h)
    assert torch.equal(out[out != 0], h[out != 0]) and bool((out == 0).any())
    for one in gates(model):
        one.p = 0.0
    assert same(stock, forward(model.eval(), tiny.inputs))


def test_bad_settings() -> None:
    model = build("llama").model
    for settings, message in (
        ({"p": 1.0}, "p=1.0 is out of range"),
        ({"alpha": -1.0}, "alpha=-1.0 is out of range"),
        ({"expectation": "mean"}, "expectation='mean' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            patch_model(model, "standout", **settings)
    with pytest.raises(ValueError, match="an FFN whose pre-activation can be seen"):
        patch_model(build("gpt_oss").model, "standout")
    gate = gate_of(patch_model(model.train(), "standout"))
    with pytest.raises(RuntimeError, match="pre-activations None"):
        gate.transform(torch.ones(2, 4))
