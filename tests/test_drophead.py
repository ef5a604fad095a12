"""DropHead's arithmetic against a slow loop, and what it promises on average."""

from __future__ import annotations

import pytest
import torch

from hf_reg.patches.drophead import drop_heads, keep_heads


def slow(heads: torch.Tensor, keep: torch.Tensor, rescale: str, p: float) -> torch.Tensor:
    out = torch.zeros_like(heads)
    for b in range(heads.shape[0]):
        kept = sum(bool(k) for k in keep[b])
        for h in range(heads.shape[2]):
            if keep[b, h]:
                factor = heads.shape[2] / kept if rescale == "kept" else 1 / (1 - p)
                out[b, :, h] = heads[b, :, h] * factor
    return out


@pytest.mark.parametrize("rescale", ["kept", "expectation"])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_equals_the_slow_loop(rescale: str, count: int) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        heads, keep = torch.randn(3, 5, count, 4), keep_heads(3, count, 0.4)
        assert torch.allclose(
            drop_heads(heads, keep, rescale=rescale, p=0.4), slow(heads, keep, rescale, 0.4), atol=1e-6
        )


@pytest.mark.parametrize("p", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_at_least_one_head_stays(p: float, count: int) -> None:
    keep = keep_heads(5000, count, p)
    assert keep.any(1).all()
    expected = 1 - p + p**count / count  # the rescued head is one of `count`, uniformly
    assert (keep.float().mean(0) - expected).abs().max() < 0.03


def test_mean_over_draws_is_the_undropped_output() -> None:
    torch.manual_seed(0)
    one = torch.randn(1, 2, 8, 3)
    heads = one.expand(40_000, -1, -1, -1)
    mean = drop_heads(heads, keep_heads(40_000, 8, 0.3), rescale="kept").mean(0)
    assert (mean - one[0]).abs().max() < 0.03


def test_dropped_heads_get_no_gradient_and_kept_ones_the_scale() -> None:
    heads = torch.randn(1, 2, 4, 3, requires_grad=True)
    drop_heads(heads, torch.tensor([[True, False, True, True]])).sum().backward()
    assert torch.allclose(heads.grad[0, :, :, 0], torch.tensor([4 / 3, 0, 4 / 3, 4 / 3]).expand(2, -1))


def test_bad_arguments_are_named() -> None:
    heads, keep = torch.randn(2, 3, 4, 5), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="pass p"):
        drop_heads(heads, keep, rescale="expectation")
    with pytest.raises(ValueError, match=r"expected \(B, T, H, D\) and \(B, H\)"):
        drop_heads(heads, keep[:, :3])
    with pytest.raises(ValueError, match="rescale='mean' is not known"):
        drop_heads(heads, keep, rescale="mean")
