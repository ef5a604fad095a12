"""Drift of spectra: cases whose answer is known, adapters, and everything that is refused."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_reg.adapters.drift import LayerDrift, spectrum_drift


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def triplets(out: int, inn: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random singular vectors and the values k, k - 1, ..., 1."""
    k = min(out, inn)
    u, v = torch.linalg.qr(random(out, k)).Q, torch.linalg.qr(random(inn, k, seed=1)).Q
    return u, torch.arange(k, 0, -1).float(), v


def one(before: torch.Tensor, after: torch.Tensor, **settings: object) -> LayerDrift:
    (row,) = spectrum_drift({"x.weight": before}, {"x.weight": after}, **settings).rows  # type: ignore[arg-type]
    return row


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=30
    )
    return hf.LlamaForCausalLM(config)


def lora(model: nn.Module, **settings: object) -> nn.Module:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(model, LoraConfig(**settings))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model


def test_nothing_moved() -> None:
    row = one(random(12, 9), random(12, 9), rank=4)
    assert row.values == 0 and row.vectors == pytest.approx(0, abs=1e-6) and row.overlap == pytest.approx(1)
    assert row.condition_before == row.condition_after and row.effective_rank_before == row.effective_rank_after


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)], ids=str)
def test_scaling_moves_values_only(shape: tuple[int, int]) -> None:
    u, s, v = triplets(*shape)
    row = one((u * s) @ v.mT, 1.5 * (u * s) @ v.mT, rank=3)
    assert row.values == pytest.approx(0.5 * float(s.mean()), rel=1e-5)
    assert row.vectors == pytest.approx(0, abs=1e-6) and row.overlap == pytest.approx(1, abs=1e-6)
    assert row.condition_before == pytest.approx(9 / 7, rel=1e-5) == row.condition_after
    entropy = -sum(float(x / s.sum()) * math.log(float(x / s.sum())) for x in s)
    assert row.effective_rank_before == pytest.approx(math.exp(entropy), rel=1e-5)


def test_rotation_moves_vectors_only() -> None:
    u, s, v = triplets(12, 9)
    angle = 0.3
    turn = torch.eye(12)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    rotated = u @ turn[:9, :9]  # of u_1 and u_2 among themselves
    row = one((u * s) @ v.mT, (rotated * s) @ v.mT, rank=2)
    assert row.values == pytest.approx(0, abs=1e-5)
    assert row.vectors == pytest.approx((2 * (1 - math.cos(angle)) + 7 * 0) / (2 * 9), rel=1e-4)
    assert row.overlap == pytest.approx(1, abs=1e-5)  # the same leading plane
    assert one((u * s) @ v.mT, (rotated * s) @ v.mT, rank=1).overlap == pytest.approx(
        (math.cos(angle) ** 2 + 1) / 2, rel=1e-4
    )


def test_both_sides_count_and_are_averaged() -> None:
    """A layer where every left vector and every right vector turned by its own angle, against a slow loop."""
    before, after = random(7, 5), random(7, 5) + 0.3 * random(7, 5, seed=2)
    (u, s, v), (u2, s2, v2) = (torch.linalg.svd(w.double(), full_matrices=False) for w in (before, after))
    left = [abs(float(u[:, i] @ u2[:, i])) for i in range(5)]
    right = [abs(float(v[i] @ v2[i])) for i in range(5)]
    row = one(before, after)
    assert row.vectors == pytest.approx(1 - sum(left + right) / 10, rel=1e-4)
    assert row.values == pytest.approx(sum(abs(float(a - b)) for a, b in zip(s, s2, strict=True)) / 5, rel=1e-4)


def test_order_of_equal_shapes_in_swapped_values() -> None:
    """Two values that change places: their vectors turn by 90 degrees, the leading plane stays."""
    u, s, v = triplets(6, 4)
    swapped = s[[1, 0, 2, 3]]
    row = one((u * s) @ v.mT, (u * swapped) @ v.mT, rank=2)
    assert row.values == pytest.approx(0, abs=1e-5) and row.vectors == pytest.approx(0.5, abs=1e-5)
    assert row.overlap == pytest.approx(1, abs=1e-5)


def test_rank_above_the_short_side_is_the_whole() -> None:
    row = one(random(4, 3), random(4, 3), rank=16)
    assert row.overlap == pytest.approx(1) and row.condition_before == pytest.approx(
        float(torch.linalg.cond(random(4, 3))), rel=1e-4
    )


def test_half_precision() -> None:
    assert one(random(9, 7).bfloat16(), random(9, 7).half()).vectors < 0.01


def test_models_and_state_dicts_agree() -> None:
    base, tuned = llama(0), llama(1)
    found = spectrum_drift(base.state_dict(), tuned.state_dict(), target_modules=r".*(q|down)_proj").rows
    assert found == spectrum_drift(base, tuned, target_modules=["q_proj", "down_proj"]).rows
    assert [row.name for row in found] == [
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    with pytest.raises(ValueError, match="only in one of the models"):
        spectrum_drift(base, nn.ModuleDict({"inner": tuned}))  # another wrapper, other names


def test_every_linear_layer_by_default_and_compiled_names() -> None:
    base, tuned = llama(0), llama(1)
    rows = spectrum_drift(base, tuned).rows
    assert len(rows) == 2 * 7 + 1 and rows[-1].name == "lm_head"
    assert spectrum_drift(base, torch.compile(tuned)).rows == rows


def test_conv1d() -> None:
    small = {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 30, "bos_token_id": 0, "eos_token_id": 0}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**small))
    assert {row.kind for row in spectrum_drift(model, model).rows} == {
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
        "lm_head",
    }


def test_adapter_counts_as_merged_and_is_left_alone() -> None:
    base = llama()
    tuned = lora(copy.deepcopy(base))
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    own = spectrum_drift(None, tuned).rows
    assert [row.name for row in own] == [
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert all(row.values > 1e-3 and row.vectors > 1e-3 for row in own)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
    every = spectrum_drift(base, tuned).rows
    assert [row for row in every if row.kind in ("self_attn.q_proj", "mlp.down_proj")] == own
    assert all(row.values == 0 for row in every if row.kind not in ("self_attn.q_proj", "mlp.down_proj"))
    merged = copy.deepcopy(tuned).merge_and_unload()
    for row, want in zip(own, spectrum_drift(base, merged, target_modules=["q_proj", "down_proj"]).rows, strict=True):
        assert row.values == pytest.approx(want.values, rel=1e-3)
        assert row.vectors == pytest.approx(want.vectors, rel=1e-2)


def test_several_active_adapters_add_up() -> None:
    tuned = lora(llama())
    alone = spectrum_drift(None, tuned).rows[0].values
    tuned.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.base_model.set_adapter(["default", "other"])
    merged = copy.deepcopy(tuned).merge_and_unload()
    row = spectrum_drift(None, tuned, target_modules=["q_proj"]).rows[0]
    want = spectrum_drift(llama(), merged, target_modules=["q_proj"]).rows[0]
    assert row.values == pytest.approx(want.values, rel=1e-4) != pytest.approx(alone)


def test_modules_to_save_count_as_tuned() -> None:
    base = llama()
    tuned = lora(copy.deepcopy(base), modules_to_save=["lm_head"])
    with torch.no_grad():
        tuned.lm_head.modules_to_save["default"].weight.mul_(2)
    rows = {row.name: row for row in spectrum_drift(base, tuned).rows}
    assert len(rows) == 15 and rows["lm_head"].values > 0


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_adapters_that_are_no_plain_sum(settings: dict) -> None:
    tuned = lora(llama(), **settings)
    with pytest.raises(ValueError, match="Pass the pretrained model as `base`"):
        spectrum_drift(None, tuned)


def test_pissa_against_the_pretrained_model() -> None:
    base = llama()
    tuned = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa"))
    assert max(row.vectors for row in spectrum_drift(base, tuned).rows) < 1e-4  # not trained yet


def merged() -> nn.Module:
    model = lora(llama())
    model.merge_adapter()
    return model


REFUSED = {
    "merged": (lambda: (None, merged()), "q_proj: Its adapter is merged.*unmerge_adapter"),
    "no adapter": (lambda: (None, llama()), "base=None needs a model with adapters"),
    "adapter's state dict": (lambda: (llama(), lora(llama()).state_dict()), "tuned: .*lora_A.*belongs to an adapter"),
    "missing layer": (lambda: ({"a.weight": random(3, 2)}, {"b.weight": random(3, 2)}), "2 layers are only in one.*b"),
    "shapes": (
        lambda: ({"a.weight": random(3, 2)}, {"a.weight": random(4, 2)}), r"a: \(3, 2\) in base, \(4, 2\) in tuned",
    ),
    "meta": (lambda: ({"a.weight": random(3, 2)}, {"a.weight": random(3, 2).to("meta")}), "a: .*no values yet"),
    "quantised": (
        lambda: ({"a.weight": random(3, 2)}, {"a.weight": torch.ones(3, 2, dtype=torch.int8)}), "a: .*dequantised",
    ),
    "not finite": (lambda: ({"a.weight": random(3, 2)}, {"a.weight": random(3, 2) / 0}), "a: .*not finite"),
    "nothing": (lambda: ({}, {}), "selects no linear layer; the kinds here: none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    make, message = REFUSED[case]
    base, tuned = make()
    with pytest.raises(ValueError, match=message):
        spectrum_drift(base, tuned)


def test_more_refusals() -> None:
    with pytest.raises(ValueError, match="'typo'.*selects no linear layer.*down_proj, gate_proj"):
        spectrum_drift(llama(), llama(), target_modules=["typo"])
    with pytest.raises(ValueError, match="rank 0: expected at least 1"):
        spectrum_drift(llama(), llama(), rank=0)
    with pytest.raises(TypeError, match="tuned: expected a model .* or a state dict, got str"):
        spectrum_drift(llama(), "model")  # type: ignore[arg-type]


def test_table_and_html() -> None:
    found = spectrum_drift(llama(0), llama(1), rank=4)
    text = str(found)
    assert "rank 4" in text and "model.layers.1.mlp.down_proj" in text and "s_1 / s_4" in text and "mean" in text
    assert found._repr_html_().startswith("<pre")
    many = type(found)(found.rows * 4, 4)
    assert "8 x self_attn.q_proj" in str(many) and ".rows has all 60 layers" in str(many)


def test_plot_and_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    found = spectrum_drift(llama(0), llama(1))
    (axes,) = found.plot().axes
    assert len(axes.collections) == len(found.kinds) == 8
    assert sum(len(points.get_offsets()) for points in axes.collections) == len(found.rows)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf_reg\[report\]"):
        found.plot()
