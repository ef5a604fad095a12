"""Tensor dropout: on the rank of LoRA and of layers that mark theirs; adapters are saved as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_reg import SorsaConfig, describe, get_regularized_peft_model, patch_model, unpatch_model
from hf_reg.seams.attention import gates, seams
from hf_reg.sites.rank import find_ranks

from .architectures import build, forward
from .properties import reseed


def adapted(**settings: Any) -> tuple[Any, dict[str, Any]]:
    tiny = build("llama")
    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False, **settings)
    return get_peft_model(tiny.model, config).train(), tiny.inputs


def test_components_are_dropped_as_the_sketch_says() -> None:
    """Against a slow loop over components: B diag(lambda / theta) A x, one lambda for the whole batch."""
    model, inputs = adapted()
    patch_model(model, "tensor_dropout", p=0.4)
    layer = model.base_model.model.layers[0].self_attn.q_proj
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    layer.lora_B["default"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    counts = torch.zeros(4)
    for seed in range(80):
        seen.clear()
        reseed(seed)
        model(**inputs)
        between, x, output = seen
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected, kept = layer.base_layer(x), []
        for k in range(4):
            component = x @ a[k]
            factor = (between[..., k] / component).flatten()
            torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=1e-3, atol=1e-3)
            kept.append(factor[0].item())
            expected = expected + layer.scaling["default"] * kept[-1] * component[..., None] * b[:, k]
        torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-3)
        assert all(abs(one) < 1e-4 or abs(one - 1 / 0.6) < 1e-3 for one in kept)
        counts += torch.tensor([one > 1 for one in kept])
    assert (counts / 80 - 0.6).abs().max() < 0.18


def test_an_example_may_have_its_own() -> None:
    model, inputs = adapted()
    patch_model(model, "tensor_dropout", p=0.5, granularity="example")
    seen: list[torch.Tensor] = []
    layer = model.base_model.model.layers[0].mlp.down_proj
    layer.lora_B["default"].register_forward_pre_hook(lambda module, args: seen.append(args[0] == 0))
    for _ in range(8):
        model(**inputs)
    assert all((each == each[:, :1]).all() for each in seen) and any((each[0] != each[1]).any() for each in seen)


def test_the_adapter_is_saved_and_managed_as_before(tmp_path: Path) -> None:
    model, inputs = adapted()
    keys = list(model.state_dict())
    patch_model(model, "tensor_dropout", p=0.5)
    assert list(model.state_dict()) == keys and "4 / 4" in str(describe(model)) and "adapter" in str(describe(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama").model, tmp_path)
    assert torch.equal(loaded.eval()(**inputs)[0], model.eval()(**inputs)[0])
    model.train()
    with model.disable_adapter():
        assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.set_adapter("other")
    assert torch.equal(model(**inputs)[0], model(**inputs)[0]), "an adapter that came later"
    patch_model(model, "tensor_dropout", p=0.5)
    assert len(list(gates(model))) == 6 and len({(path, name) for path, _, name, _ in seams(model)}) == 6
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
    model.delete_adapter("other")
    model.set_adapter("default")
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
    merged = model.merge_and_unload().train()
    assert torch.equal(merged(**inputs)[0], merged(**inputs)[0]) and not list(gates(merged))


class Rank(nn.Identity):
    rank_dim = -1


class Factorized(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.first, self.rank = nn.Linear(linear.in_features, 3, bias=False), Rank()
        self.second = nn.Linear(3, linear.out_features, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.second(self.rank(self.first(states)))


@pytest.mark.parametrize("dim", [-1, 0])
def test_a_layer_that_marks_its_rank_takes_part(dim: int) -> None:
    tiny = build("llama")
    layer = Factorized(tiny.model.layers[1].self_attn.q_proj)
    tiny.model.layers[1].self_attn.q_proj = layer
    layer.rank.rank_dim = dim  # type: ignore[assignment]
    if dim == 0:  # the weight is built from its factors
        layer.forward = lambda x: x @ layer.rank(layer.first.weight).T @ layer.second.weight.T  # type: ignore[method-assign]
    [site] = find_ranks(tiny.model)
    assert (site.kind, site.layer, site.dim) == ("factorized", 1, dim)
    model = patch_model(tiny.model.train(), "tensor_dropout", p=0.5)
    states, rows = torch.randn(2, 5, 64), []
    for seed in range(40):
        reseed(seed)
        rows.append(layer(states))
    plain = unpatch_model(model).layers[1].self_attn.q_proj(states)
    terms = torch.stack([(states @ layer.first.weight[k])[..., None] * layer.second.weight[:, k] for k in range(3)])
    possible = {
        mask: 2 * sum((terms[k] for k in range(3) if mask >> k & 1), torch.zeros_like(plain)) for mask in range(8)
    }
    met = {mask for row in rows for mask, value in possible.items() if torch.allclose(row, value, atol=1e-4)}
    assert len(met) >= 6 and all(any(torch.allclose(row, v, atol=1e-4) for v in possible.values()) for row in rows)


def test_compiles_in_one_graph() -> None:
    model, inputs = adapted()
    inputs["use_cache"] = False
    patch_model(model, "tensor_dropout", p=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    one = compiled(**inputs)[0]
    assert not torch.equal(one, compiled(**inputs)[0])
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for gate in gates(model):
        gate.factor = 0.5  # type: ignore[attr-defined]
    compiled(**inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


def test_errors() -> None:
    with pytest.raises(ValueError, match="'llama': it has no low-rank layer"):
        patch_model(build("llama").model, "tensor_dropout")
    model, _ = adapted()
    with pytest.raises(ValueError, match="p=1.0 is out of range"):
        patch_model(model, "tensor_dropout", p=1.0)
    with pytest.raises(ValueError, match="granularity='token' is not known"):
        patch_model(model, "tensor_dropout", granularity="token")
    dora, _ = adapted(use_dora=True)
    with pytest.raises(ValueError, match="is a DoraLinearVariant, which computes with its factors"):
        patch_model(dora, "tensor_dropout")
    sorsa = get_regularized_peft_model(build("llama").model, SorsaConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="which computes with its factors"):
        patch_model(sorsa, "tensor_dropout")
    assert not seams(dora) and not seams(sorsa)


def test_factorized_layers_are_low_rank_layers() -> None:
    """Both patches together, and off again in either order."""
    tiny = build("llama")
    model = patch_model(patch_model(tiny.model.train(), "factorized"), "tensor_dropout")
    found = [site for site in find_ranks(model) if site.kind == "factorized"]
    assert len(found) == 14 and all(site.path.endswith(".components") for site in found)
    reseed(0)
    one = forward(tiny, tiny.inputs)[0]
    assert not torch.equal(one, forward(tiny, tiny.inputs)[0])
    dense = model.eval().layers[0].mlp.down_proj.weight.detach().clone()
    plain = forward(tiny, tiny.inputs)[0]
    unpatch_model(model, "factorized")
    torch.testing.assert_close(model.layers[0].mlp.down_proj.weight.detach(), dense)
    torch.testing.assert_close(forward(tiny, tiny.inputs)[0], plain, atol=1e-4, rtol=1e-4)
    unpatch_model(model)
    assert not seams(model) and not any("hf_reg" in name for name, _ in model.named_modules())
