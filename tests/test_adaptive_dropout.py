"""Adaptive dropout against a slow loop, its mean and variance, and its annealing by layer."""

from __future__ import annotations

import pytest
import torch

from hf_reg import patch_model
from hf_reg.schedules import model_step
from hf_reg.seams.attention import gates

from .architectures import build, forward


def gate(**settings: object):
    model = patch_model(build("llama").model.train(), "adaptive_dropout", **settings)
    return next(iter(gates(model)))


def slow(x: torch.Tensor, mask: torch.Tensor, p: float, weight: float, mix: str) -> torch.Tensor:
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            token, share = x[b, t], 1 - weight
            if mix == "variance":
                mean = sum(token.tolist()) / len(token)
                variance = sum((value - mean) ** 2 for value in token.tolist()) / len(token)
                share *= (variance / (variance + mean**2)) ** 0.5
            for c in range(x.shape[2]):
                dropped = token[c] / (1 - p) if mask[b, c] else 0.0
                out[b, t, c] = (1 - share) * token[c] + share * dropped
    return out


@pytest.mark.parametrize("mix", ["constant", "variance"])
def test_equals_the_slow_loop(mix: str) -> None:
    one = gate(p=0.4, weight=0.3, mix=mix)
    x = torch.randn(3, 4, 6) + 0.7
    torch.manual_seed(5)
    out = one.transform(x)
    torch.manual_seed(5)
    mask = torch.rand(3, 1, 6)[:, 0] >= 0.4
    torch.testing.assert_close(out, slow(x, mask, 0.4, 0.3, mix), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mix", ["constant", "variance"])
def test_mean_is_kept_and_the_variance_grows_as_derived(mix: str) -> None:
    one = gate(p=0.5, weight=0.3, mix=mix)
    x = torch.randn(1, 1, 400) * 2 + 3
    draws = one.transform(x.expand(4000, 1, 400))[:, 0]
    assert (draws.mean(0) - x[0, 0]).abs().max() < 0.6
    mean, variance = x.mean(), x.var(correction=0)
    share = 0.7 if mix == "constant" else 0.7 * (variance / (variance + mean**2)).sqrt()
    wanted = variance + share**2 * (mean**2 + variance)
    assert draws.var(1, correction=0).mean() == pytest.approx(wanted.item(), rel=0.02)
    if mix == "variance":
        assert wanted.item() == pytest.approx((variance * (1 + 0.7**2)).item(), rel=1e-4)


def test_a_channel_is_dropped_for_a_whole_example_and_flattened_tokens_share_the_mask() -> None:
    one = gate(weight=0.0)
    out = one.transform(torch.ones(8, 5, 64))
    assert torch.equal(out, out[:, :1].expand_as(out)) and not torch.equal(out[0], out[1])
    flat = one.transform(torch.ones(10, 64))
    assert torch.equal(flat, flat[:1].expand_as(flat)) and 0 < (flat == 0).float().mean() < 1


def test_channels_of_a_convolution() -> None:
    tiny = build("squeezebert")
    patch_model(tiny.model.train(), "adaptive_dropout")
    one = next(iter(gates(tiny.model)))
    assert one.dim == 1
    out = one.transform(torch.ones(2, 16, 5))
    assert torch.equal(out, out[:, :, :1].expand_as(out)) and not torch.equal(out[:, 0], out[:, 1])


def test_for_relu_it_may_stand_before_or_after() -> None:
    one, x = gate(), torch.randn(2, 3, 16)
    torch.manual_seed(0)
    before = torch.relu(one.transform(x))
    torch.manual_seed(0)
    torch.testing.assert_close(one.transform(torch.relu(x)), before)


def test_layers_are_switched_off_one_after_another() -> None:
    tiny = build("llama")
    model = patch_model(tiny.model.train(), "adaptive_dropout", anneal=0.5, schedule="linear")
    seen = {}
    for step in (0, 24, 25, 49, 50, 99):
        model_step(model, step, 100)
        seen[step] = [one.factor for one in gates(model)]
    assert seen == {
        0: [1.0, 1.0], 24: [0.76, 0.76], 25: [0.0, 0.75], 49: [0.0, 0.51], 50: [0.0, 0.0], 99: [0.0, 0.0]
    }  # fmt: skip
    state = torch.get_rng_state()
    forward(tiny, tiny.inputs)
    assert torch.equal(state, torch.get_rng_state()), "the plain forward draws nothing"
    patch_model(model, "adaptive_dropout", anneal=0.0)
    model_step(model, 100, 100)
    assert [one.factor for one in gates(model)] == [1.0, 1.0]


def test_bad_settings() -> None:
    for settings, message in (
        ({"p": 1.0}, "p=1.0 is out of range"),
        ({"weight": 1.0}, "weight=1.0 is out of range"),
        ({"mix": "learned"}, "mix='learned' is not known"),
        ({"anneal": 1.5}, "anneal=1.5 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            gate(**settings)
