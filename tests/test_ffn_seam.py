"""Where FFNs and residual branches are, and that what passes there goes through the gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_reg import describe, patch_model, patched, unpatch_model
from hf_reg.seams.attention import gates, seams
from hf_reg.sites.ffn import find_ffn, find_ffn_uncovered
from hf_reg.sites.residual import find_branches

from .architectures import build, forward
from .properties import reseed


EXPECTED = {  # the FFNs of a tiny model: where, how many, gated, layer numbers
    "bert": ("output.dense", "projection", 2, False),
    "gpt2": ("mlp.c_proj", "projection", 2, False),
    "llama": ("mlp.down_proj", "projection", 2, True),
    "phi3": ("mlp.down_proj", "projection", 2, True),  # gate and up in one projection
    "opt": ("fc2", "projection", 2, False),
    "t5": ("DenseReluDense.wo", "projection", 4, False),
    "albert": ("ffn_output", "projection", 1, False),
    "mixtral": ("experts.act_fn", "activation", 2, True),
    "gpt_oss": ("mlp.experts", "experts", 2, True),
    "dbrx": ("mlp.activation_fn", "activation", 2, True),
    "jetmoe": ("output_linear", "projection", 2, True),
    "ctrl": ("ffn.2", "projection", 2, False),  # in a Sequential, which would call whatever it holds
    "xlm": ("lin2", "projection", 2, False),
    "mgp-str": ("mlp.fc2", "projection", 2, False),  # layers in a Sequential
    "squeezebert": ("output.conv1d", "projection", 2, False),
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_ffns_are_found(model_type: str) -> None:
    model = build(model_type).model
    sites = find_ffn(model)
    ending, kind, count, gated = EXPECTED[model_type]
    assert [site.path.endswith(ending) and site.kind == kind and site.gated == gated for site in sites] == [
        True
    ] * count
    assert all(model.get_submodule(site.path) is site.module is site.parent.get_submodule(site.name) for site in sites)
    assert {site.layers for site in sites} == {1 if count == 1 else 2} and not find_ffn_uncovered(model, sites)


BRANCHES = {
    "bert": ["attention.output.dense", "output.dense"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "mixtral": ["self_attn.o_proj", "mlp"],  # the block that holds the experts
    "qwen2_moe": ["self_attn.o_proj", "mlp"],  # and a shared one
    "switch_transformers": ["SelfAttention.o", "mlp"],  # experts in a dict
    "vit": ["attention.o_proj", "mlp.fc2"],
    "diffusion_gemma_text": ["self_attn.o_proj", "experts"],  # experts without a block of their own
}


@pytest.mark.parametrize("model_type", BRANCHES)
def test_branches_are_found(model_type: str) -> None:
    """Zeroing every branch at its end leaves the residual stream as it came in."""
    model = build(model_type).model
    sites = find_branches(model)
    for kind, ending in zip(("attention", "ffn"), BRANCHES[model_type], strict=True):
        found = [site.path for site in sites if site.kind == kind]
        assert found and any(path.endswith(ending) for path in found), found
    assert len({site.path for site in sites}) == len(sites)


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe", "gpt2"])
def test_zeroed_branches_leave_the_stream(model_type: str) -> None:
    tiny = build(model_type)
    model = tiny.model.eval()
    for site in find_branches(model):
        site.module.register_forward_hook(
            lambda module, args, output: (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0
        )
    with torch.no_grad():
        states = model(**tiny.inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0], states[1])


def test_half_of_the_units_are_dropped_and_the_others_doubled() -> None:
    tiny = build("llama")
    model = patch_model(tiny.model.train(), "ffn_dropout", p=0.5)
    seen: dict[str, list[torch.Tensor]] = {"before": [], "after": []}
    down = model.layers[0].mlp.down_proj
    model.layers[0].mlp.act_fn.register_forward_hook(lambda m, a, o: seen["before"].append(o))
    model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, o: seen["before"].append(o))
    down.register_forward_pre_hook(lambda m, a: seen["after"].append(a[0]))
    forward(tiny, tiny.inputs)
    whole, after = seen["before"][0] * seen["before"][1], seen["after"][0]
    kept = after != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(after[kept], 2 * whole[kept])


@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_the_adapter_of_a_down_projection_sees_what_is_dropped(first: str) -> None:
    """The input of LoRA's own path is the one with dropped units, whichever came first."""
    tiny = build("llama")
    config = LoraConfig(target_modules=["down_proj"], r=2)
    model: Any = tiny.model.train()
    if first == "patch":
        model = get_peft_model(patch_model(model, "ffn_dropout", p=0.5), config)
    else:
        model = patch_model(get_peft_model(model, config), "ffn_dropout", p=0.5)
    layer = model.base_model.model.layers[0].mlp.down_proj
    seen: list[torch.Tensor] = []
    layer.lora_A["default"].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    layer.base_layer.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model.train()
    model(**tiny.inputs)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1]) and 0.4 < (seen[0] == 0).float().mean() < 0.6
    assert len([name for name, _ in model.named_modules() if name.endswith("hf_reg_2_input")]) == 2
    plain = unpatch_model(model).eval()(**tiny.inputs)[0]
    assert torch.equal(plain, model.train()(**tiny.inputs)[0])
    assert not seams(model)


def test_an_adapter_taken_off_again() -> None:
    tiny = build("llama")
    model: Any = get_peft_model(
        patch_model(tiny.model, "ffn_dropout", p=0.5), LoraConfig(target_modules=["down_proj"])
    )
    model.train()(**tiny.inputs)
    base = model.merge_and_unload().train()
    reseed(0)
    one = base(**tiny.inputs)[0]
    assert not torch.equal(one, base(**tiny.inputs)[0])
    down = base.layers[0].mlp.down_proj
    assert sum(type(hook).__module__.startswith("hf_reg") for hook in down._forward_pre_hooks.values()) == 1


def test_patches_of_three_seams_on_one_model() -> None:
    tiny = build("bert")
    model = patch_model(tiny.model.train(), ["tlm", "ffn_dropout", "residual_dropout"])
    text = str(describe(model))
    assert "ffn_dropout" in text and "projection (input)" in text and "2 / 2" in text and "4 / 4" in text
    assert sorted({gate.patch.name for gate in gates(model)}) == ["ffn_dropout", "residual_dropout", "tlm"]
    with patched(model, "ffn_dropout", p=0.3):
        assert {gate.p for gate in gates(model) if gate.patch.name == "ffn_dropout"} == {0.3}
    assert {gate.p for gate in gates(model) if gate.patch.name == "ffn_dropout"} == {0.1}
    other = copy.deepcopy(model)
    unpatch_model(model, "ffn_dropout")
    assert sorted({gate.patch.name for gate in gates(model)}) == ["residual_dropout", "tlm"]
    assert len(list(gates(other))) == 8
    patch_model(model, "residual_dropout", branch="attention", layers=[1])
    assert [path for path, _, _, seam in seams(model) if "residual_dropout" in seam._modules] == [
        "encoder.layer.1.attention.output"
    ]


def test_convolutions_beside_an_ffn_are_none() -> None:
    """A gated convolution doubles the width that an FFN's projection halves."""
    sites = find_ffn(build("seamless_m4t").model)
    assert sites and not [site.path for site in sites if "conv" in site.path]


@pytest.mark.parametrize(
    ("model_type", "ends"), [("nemotron_h", ("experts.act_fn", "shared_experts.down_proj")), ("levit", ("linear",))]
)
def test_ffns_in_layers_of_their_own_are_found(model_type: str, ends: tuple[str, ...]) -> None:
    """Layers of one kind, of which some mix tokens and others are the FFN; in LeViT also after the last that mixes."""
    paths = [site.path for site in find_ffn(build(model_type).model)]
    assert len(paths) == {"nemotron_h": 2, "levit": 8}[model_type] and all(path.endswith(ends) for path in paths)


def test_what_a_sequential_holds_is_not_called_by_it() -> None:
    tiny = build("ctrl")
    reseed(0)
    plain = forward(tiny.model.train(), tiny.inputs)[0]
    patch_model(tiny.model, "ffn_dropout", p=0.5)
    reseed(0)
    assert not torch.equal(plain, forward(tiny.model, tiny.inputs)[0])


def test_errors() -> None:
    model = build("llama").model
    with pytest.raises(ValueError, match=r"ffn_dropout: p=1.0 is out of range"):
        patch_model(model, "ffn_dropout", p=1.0)
    with pytest.raises(ValueError, match="layers='9:' selects no FFN"):
        patch_model(model, "ffn_dropout", layers="9:")
    with pytest.raises(ValueError, match="branch='mlp' is not known"):
        patch_model(model, "residual_dropout", branch="mlp")
    with pytest.raises(ValueError, match="ffn_dropout found nothing to patch in 'Linear': it has no FFN"):
        patch_model(nn.Linear(2, 2), "ffn_dropout")
    assert not seams(model)


@pytest.mark.parametrize("patch", ["ffn_dropout", "residual_dropout"])
def test_compiles_in_one_graph(patch: str) -> None:
    tiny = build("llama")
    tiny.inputs["use_cache"] = False
    model = patch_model(tiny.model.train(), patch, p=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    one = compiled(**tiny.inputs)[0]
    assert not torch.equal(one, compiled(**tiny.inputs)[0])
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for gate in gates(model):
        gate.factor = 0.5
    compiled(**tiny.inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
    unpatch_model(model)
