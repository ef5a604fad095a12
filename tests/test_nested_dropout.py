"""Nested dropout: the distribution of the cut, one for an example, no rescaling; the read-out of channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_reg import patch_model, unpatch_model
from hf_reg.patches.nested_dropout import channel_importance
from hf_reg.seams.attention import gates

from .architectures import build, forward
from .properties import Case, check, lively, reseed, without_dropout


def kept(model_type: str, runs: int = 1, **settings: Any) -> dict[str, list[torch.Tensor]]:
    """Which channels each FFN keeps, by path."""
    tiny = build(model_type)
    model = patch_model(lively(without_dropout(tiny.model)).train(), "nested_dropout", **settings)
    found: dict[str, list[torch.Tensor]] = {}
    for gate in gates(model):

        def seen(states: torch.Tensor, gate: Any = gate) -> torch.Tensor:
            ones = type(gate).transform(gate, torch.ones_like(states))
            found.setdefault(gate.path, []).append(ones.detach())
            return states * ones

        gate.transform = seen  # type: ignore[method-assign]
    for seed in range(runs):
        reseed(seed)
        with torch.no_grad():
            forward(model, tiny.inputs)
    return found


def test_the_cut_is_geometric() -> None:
    """b drawn by a slow loop, unit by unit, with rho of the paper, has the frequencies of ours."""
    rate, width = 0.7, 128
    masks = torch.cat([each[:, 0] for each in kept("bert", 200, p=rate)["encoder.layer.0.output.dense"]])
    assert masks.shape == (400, width) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks.diff(dim=1) <= 0).all() and (masks[:, 0] == 1).all()  # a prefix, never empty
    rho = (1 - rate) ** (1 / (width - 1))
    torch.manual_seed(0)
    drawn = []
    for _ in range(400):
        b = 1
        while b < width and torch.rand(()) < rho:
            b += 1
        drawn.append(b)
    ours, slow = masks.sum(1), torch.tensor(drawn, dtype=torch.float)
    for k in (1, 32, 64, 96, width):
        expected = rho ** (k - 1)
        assert abs((ours >= k).float().mean() - expected) < 0.08 and abs((slow >= k).float().mean() - expected) < 0.08
    expected_part = -rate / torch.log(torch.tensor(1 - rate))  # the mean over channels, as the docstring says
    assert abs(masks.mean() - expected_part) < 0.03


@pytest.mark.parametrize("model_type", ["bert", "opt", "squeezebert"])
def test_one_cut_an_example_or_one_a_batch(model_type: str) -> None:
    """OPT's FFN sees (B * T, C), that of SqueezeBERT (B, C, T)."""
    for granularity in ("example", "batch"):
        differ = False
        for masks in kept(model_type, 6, p=0.9, granularity=granularity).values():
            for mask in masks:
                each = mask.unflatten(0, (2, -1)) if mask.dim() == 2 else mask
                each = each.transpose(1, 2) if model_type == "squeezebert" else each
                assert (each == each[:, :1]).all(), "tokens of one example differ"
                assert (each.diff(dim=-1) <= 0).all()
                differ |= not torch.equal(each[0], each[1])
        assert differ == (granularity == "example")


def test_each_token_of_an_expert_has_its_own() -> None:
    [masks, *_] = kept("mixtral", p=0.9).values()
    assert masks[0].dim() == 2 and len({int(row.sum()) for row in masks[0]}) > 4


@pytest.mark.parametrize("model_type", ["opt", "qwen2_moe"])
def test_a_batch_has_the_properties(model_type: str) -> None:
    case = Case(model_type, "nested_dropout", build(model_type), {"p": 0.5, "granularity": "batch"})
    for name in ("rate_zero_is_identity", "gradients_kept", "checkpointing_repeats", "copies_are_independent"):
        assert check(case, name) is None, name


def test_training_orders_the_channels() -> None:
    """What the method is for: an FFN trained under it needs its first channels most; without it there is no order."""
    shares = {}
    for rate in (0.0, 0.95):
        tiny = build("bert")
        model = without_dropout(tiny.model).train()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        down = model.encoder.layer[0].output.dense
        with torch.no_grad():
            down.weight.zero_()
        down.weight.requires_grad_()
        patch_model(model, "nested_dropout", p=rate, layers=[0])
        reseed(0)
        goal = torch.randn(2, 12, 64)
        optimizer = torch.optim.SGD([down.weight], lr=1.0)
        for _ in range(60):
            loss = (model(**tiny.inputs)[0] - goal).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weight = channel_importance(model)["encoder.layer.0.output.dense"]
        shares[rate] = float(weight[:64].sum() / weight.sum())
    assert abs(shares[0.0] - 0.5) < 0.1 and shares[0.95] > shares[0.0] + 0.05


def test_channel_importance_is_the_norm_of_what_a_channel_writes() -> None:
    model = build("gpt2").model  # its Conv1D holds (channels, outputs)
    found = channel_importance(model)
    assert list(found) == ["h.0.mlp.c_proj", "h.1.mlp.c_proj"] and {len(each) for each in found.values()} == {256}
    ones = torch.zeros(256)
    ones[5] = 1
    down = model.h[1].mlp.c_proj
    torch.testing.assert_close(found["h.1.mlp.c_proj"][5], (down(ones) - down.bias).norm())
    llama = build("llama").model
    own: Any = get_peft_model(llama, LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False))
    adapted = channel_importance(own)
    with own.disable_adapter():
        plain = channel_importance(own)
    [(path, first), *_] = adapted.items()
    assert not torch.allclose(first, plain[path])
    merged = own.merge_and_unload()
    torch.testing.assert_close(first, merged.layers[0].mlp.down_proj.weight.norm(dim=0))
    assert patch_model(merged, "nested_dropout") is merged and len(channel_importance(merged)) == 2
    with pytest.raises(ValueError, match="Linear has no FFN whose down-projection can be read"):
        channel_importance(torch.nn.Linear(2, 2))


def test_compiles_in_one_graph() -> None:
    tiny = build("llama")
    tiny.inputs["use_cache"] = False
    model = patch_model(tiny.model.train(), "nested_dropout", p=0.9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    one = compiled(**tiny.inputs)[0]
    assert not torch.equal(one, compiled(**tiny.inputs)[0])
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for gate in gates(model):
        gate.factor = 0.5  # type: ignore[attr-defined]
    compiled(**tiny.inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
    unpatch_model(model)


def test_errors() -> None:
    model = build("llama").model
    with pytest.raises(ValueError, match="p=1.0 is out of range"):
        patch_model(model, "nested_dropout", p=1.0)
    with pytest.raises(ValueError, match="granularity='token' is not known"):
        patch_model(model, "nested_dropout", granularity="token")
    with pytest.raises(ValueError, match="none of its 2 FFNs is an FFN whose activation can be reached"):
        patch_model(build("gpt_oss").model, "nested_dropout")
