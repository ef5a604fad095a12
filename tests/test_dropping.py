"""Dropout from raw bits is dropout."""

from __future__ import annotations

import pytest
import torch

from hf_reg.draws.units import _fine, drop_by, drop_units, stay


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rate_scale_and_gradient(rate: float, dtype: torch.dtype) -> None:
    states = torch.ones(64, 1001, dtype=dtype, requires_grad=True)
    dropped = drop_units(states, rate)
    assert dropped.dtype == dtype and dropped.shape == states.shape
    share = (dropped == 0).double().mean().item()
    assert abs(share - rate) < 4 * (rate * (1 - rate) / states.numel()) ** 0.5 + 1e-9
    torch.testing.assert_close(
        dropped[dropped != 0],
        torch.full_like(dropped[dropped != 0], 1 / (1 - rate)),
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-4,
        atol=0,
    )
    dropped.sum().backward()
    assert torch.equal(states.grad, dropped.detach())


@pytest.mark.parametrize("rate", [0.1, 0.3, 1 / 512, 0.997])
def test_a_rate_that_a_byte_cannot_meet_is_met(rate: float) -> None:
    """And the scale is that of the rate."""
    values = torch.stack([drop_units(torch.ones(65_536 * 4 + 5, dtype=torch.float64), rate) for _ in range(8)])
    assert values.max().item() == pytest.approx(1 / (1 - rate), rel=1e-12)
    share = (values == 0).double().mean().item()
    assert abs(share - rate) < 4.5 * (rate * (1 - rate) / values.numel()) ** 0.5


def test_the_number_that_is_dropped_varies_as_of_independent_units() -> None:
    """Units share the start of the fine parts, which must not show in their sum."""
    ones, rate = torch.ones(4096), 0.3 + 1 / 512
    counts = torch.tensor([(drop_units(ones, rate) == 0).sum() for _ in range(3000)]).double()
    expected = ones.numel() * rate * (1 - rate)
    assert abs(counts.mean().item() - ones.numel() * rate) < 4.5 * (expected / 3000) ** 0.5
    assert 0.88 < counts.var().item() / expected < 1.12  # 4.5 standard errors


def test_fine_parts_are_uniform_for_every_unit() -> None:
    """A fixed start would give each unit a rate of its own, off by up to 1/256, whatever the mean over units."""
    found = torch.stack([_fine(8) for _ in range(2000)])
    assert ((found >= 0) & (found < 1)).all()
    assert ((found.mean(0) - 0.5).abs() < 4.5 * (1 / 12 / 2000) ** 0.5).all()
    assert ((found.var(0) - 1 / 12).abs() < 0.01).all()
    whole = _fine(65_536).mul(65_536).sort().values
    assert torch.equal(whole, torch.arange(65_536.0))  # spread evenly: each value once


def test_units_are_independent_and_follow_the_seed() -> None:
    torch.manual_seed(5)
    one, other = drop_units(torch.ones(4, 50_001), 0.5), drop_units(torch.ones(4, 50_001), 0.5)
    torch.manual_seed(5)
    assert torch.equal(one, drop_units(torch.ones(4, 50_001), 0.5)) and not torch.equal(one, other)
    kept = (one.flatten() != 0).double()
    for lag in (1, 2, 3, 4, 7, 8, 65_536):  # eight neighbours come from one draw, and bars repeat
        assert abs(torch.corrcoef(torch.stack([kept[lag:], kept[:-lag]]))[0, 1].item()) < 0.01


def test_all_and_nothing() -> None:
    assert drop_units(torch.ones(10), 1.0).abs().sum() == 0
    assert drop_units(torch.ones(0, 3), 0.5).shape == (0, 3)
    assert torch.equal(drop_units(torch.ones(3, 2).t(), 0.0), torch.ones(2, 3))


def test_gradient_of_the_gradient() -> None:
    def dropped(states: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return drop_units(states, 0.5) ** 2

    states = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dropped, states) and torch.autograd.gradgradcheck(dropped, states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probability_for_each_unit(dtype: torch.dtype) -> None:
    keep = torch.tensor([0.0, 0.25, 0.75, 1.0]).repeat(20_000, 1).to(dtype)
    before = keep.clone()
    stays = stay(keep)
    assert stays.dtype == dtype and set(stays.unique().tolist()) == {0.0, 1.0} and torch.equal(keep, before)
    shares = stays.float().mean(0)
    assert shares[0] == 0 and shares[3] == 1
    torch.testing.assert_close(shares, keep[0].float(), atol=0.015, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 20_000])  # below and above what is drawn at a time
def test_what_stays_is_scaled_so_that_the_mean_stays(dtype: torch.dtype, rows: int) -> None:
    z = torch.tensor([-2.0, 0.0, 2.0, 9.0, 1.0]).repeat(rows, 1).to(dtype).requires_grad_()
    for like in (z, z[:, 1:4], z.T):
        ones = torch.ones(like.shape, dtype=dtype, requires_grad=True)
        scale = drop_by(ones, like, torch.sigmoid)
        keep = torch.sigmoid(like.detach())
        assert scale.shape == like.shape and scale.dtype == dtype
        stays = scale != 0
        torch.testing.assert_close(scale[stays], 1 / keep[stays])
        scale.sum().backward()
        assert torch.equal(ones.grad, scale) and z.grad is None
        if rows > 3:
            rows_of = -1 if like.shape[-1] == rows else 0
            torch.testing.assert_close(stays.float().mean(rows_of), keep.float().mean(rows_of), atol=0.015, rtol=0)


def test_second_derivatives_of_probabilities_for_each_unit() -> None:
    like = torch.randn(7, dtype=torch.float32)

    def dropped(states: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return drop_by(states, like, lambda z: torch.sigmoid(z).double())

    states = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dropped, states, eps=1e-3) and torch.autograd.gradgradcheck(
        dropped, states, eps=1e-3
    )


def test_other_default_devices_and_modes_are_no_matter() -> None:
    states = torch.ones(5, 7)
    with torch.device("meta"):
        dropped = drop_units(states, 0.5)
        by = drop_by(states, states, torch.sigmoid)
    with torch.inference_mode():
        drop_units(states, 0.5)
    assert dropped.device.type == by.device.type == "cpu"
    wanted = states.requires_grad_()
    drop_units(wanted, 0.5).sum().backward()
    assert wanted.grad is not None
