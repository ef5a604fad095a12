"""Attention with dropout of probabilities on a CPU: the definition, whatever mask, heads and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from hf_reg import patch_model
from hf_reg.patching import patched
from hf_reg.seams import dropped
from hf_reg.seams.dropped import QuickDropout, dropped_attention

from .architectures import build


def states(kv_heads: int = 4, rows: int = 5, keys: int = 6, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (3, 4, rows, 2), (3, kv_heads, keys, 2), (3, kv_heads, keys, 7)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(0)) > 0.4},
    "float": {"attn_mask": torch.randn(3, 4, 5, 6, dtype=torch.float64)},
    "blind row": {"attn_mask": torch.arange(5)[:, None].expand(5, 6) > 1},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("pieces", [1, 1 << 18])
@pytest.mark.parametrize("settings", MASKS.values(), ids=MASKS)
def test_it_is_attention_with_entries_dropped(
    settings: dict[str, Any], pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropped, "SCORES", pieces)
    query, key, _ = states()
    units = torch.eye(6, dtype=torch.float64).expand(3, 4, 6, 6)  # attention to them is the matrix of probabilities
    plain = functional.scaled_dot_product_attention(query, key, units, **settings)
    torch.manual_seed(1)
    found = dropped_attention(query, key, units, dropout_p=0.25, **settings)
    stays = found != 0
    torch.testing.assert_close(found[stays], plain[stays] / 0.75)
    share = 1 - stays[plain != 0].double().mean()
    assert 0.12 < share < 0.38 and found.shape == plain.shape
    value = states()[2]
    torch.manual_seed(1)
    torch.testing.assert_close(dropped_attention(query, key, value, dropout_p=0.25, **settings), found @ value)


@pytest.mark.parametrize("settings", MASKS.values(), ids=MASKS)
def test_gradients(settings: dict[str, Any]) -> None:
    def attend(*given: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)
        return dropped_attention(*given, dropout_p=0.3, **settings)

    assert torch.autograd.gradcheck(attend, states())


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 4, 5, 6), (5, 6), (3, 1, 1, 6)])
def test_the_gradient_of_a_learned_bias(shape: tuple[int, ...]) -> None:
    def attend(bias: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)
        return dropped_attention(*(one.detach() for one in states()), bias, dropout_p=0.3)

    assert torch.autograd.gradcheck(attend, torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_the_rate_is_met() -> None:
    query, key, _ = (torch.zeros(4, 8, 64, 4) for _ in range(3))
    found = dropped_attention(query, key, torch.eye(64).expand(4, 8, 64, 64), dropout_p=0.1)
    assert abs((found == 0).double().mean() - 0.1) < 0.002
    assert abs(found.double().sum(-1).mean() - 1) < 0.002


def test_grouped_heads() -> None:
    query, key, value = states(kv_heads=2)
    torch.manual_seed(0)
    found = dropped_attention(query, key, value, dropout_p=0.2, enable_gqa=True)
    torch.manual_seed(0)
    wide = [one.repeat_interleave(2, dim=1) for one in (key, value)]
    torch.testing.assert_close(found, dropped_attention(query, *wide, dropout_p=0.2))


def test_what_it_does_not_do_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(dropped._Attention, "apply", lambda *args: calls.append(args[0].shape))
    query, key, value = states(dtype=torch.float32)
    for given, settings in (
        ((query, key, value), {}), ((query, key, value), {"dropout_p": 1.0}),
        ((query[0], key[0], value[0]), {"dropout_p": 0.5}),
        (tuple(one.bfloat16() for one in (query, key, value)), {"dropout_p": 0.5}),
        ((query, key[:1], value[:1]), {"dropout_p": 0.5}),
    ):  # fmt: skip
        assert dropped_attention(*given, **settings).shape[-2:] == (5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dropped_attention(query, key, value, dropout_p=0.5).dtype == torch.bfloat16
    assert not calls


@pytest.mark.parametrize("model_type", ["bert", "llama", "bart"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_patches_use_it(model_type: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    name = "dropped_attention" if implementation == "sdpa" else "drop_units"
    original = getattr(dropped, name)

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs.get("dropout_p", args[-1]))
        return original(*args, **kwargs)

    monkeypatch.setattr(dropped, name, spy)
    tiny = build(model_type, attn_implementation=implementation)
    with patched(tiny.model.train(), "attention_dropout", p=0.3):
        tiny.model(**tiny.inputs)
        assert seen and set(seen) == {0.3}
        seen.clear()
        tiny.model.eval()(**tiny.inputs)
    tiny.model.train()(**tiny.inputs)  # and the unpatched model does not
    assert not [rate for rate in seen if rate]


def test_dropout_of_other_functions_is_not_touched() -> None:
    states, given = torch.ones(4, 5), torch.ones(4, 5)
    with QuickDropout():
        torch.manual_seed(0)
        inside = functional.dropout(given, 0.5, True, True), functional.dropout(states, 0.5, False)
        assert inside[0] is given and torch.relu(states).sum() == 20
    torch.manual_seed(0)
    assert torch.equal(inside[0], functional.dropout(torch.ones(4, 5), 0.5)) and torch.equal(inside[1], states)


def test_checkpointed_layers_draw_the_same_again() -> None:
    tiny = build("bert")
    model = patch_model(tiny.model.train(), "attention_dropout", p=0.3)
    found = []
    for again in (False, True):
        model.gradient_checkpointing_enable() if again else None
        torch.manual_seed(0)
        model.zero_grad()
        model(**tiny.inputs)[0].sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert found[0] and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
