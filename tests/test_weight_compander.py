"""Weight compander: w = a arctan(v / b) against a loop, its start, its bounds and what is learned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_reg import describe, patch_model, unpatch_model
from hf_reg.patches.weight_compander import CompandedLayer, WeightCompander
from hf_reg.seams.reparameterized import make_dense, reparameterize

from .architectures import build, forward


def companded(weight: torch.Tensor, kind: type = nn.Linear, **settings: object) -> CompandedLayer:
    """A layer of its own with this weight."""
    out, into = weight.shape if kind is nn.Linear else weight.shape[::-1]
    layer = (nn.Linear(into, out) if kind is nn.Linear else Conv1D(out, into)).to(weight.dtype)
    layer.weight = nn.Parameter(weight)
    patch = WeightCompander(**settings)  # type: ignore[arg-type]
    reparameterize(layer, CompandedLayer, patch, patch.initial(layer, weight))
    return layer  # type: ignore[return-value]


def test_the_weight_and_its_gradient_against_a_loop() -> None:
    layer = companded(torch.randn(3, 4))
    with torch.no_grad():
        layer.weight_v += 0.7 * torch.randn(3, 4)
        layer.weight_offset.zero_()
    a, b, upstream = layer.weight_a.item(), layer.weight_b.item(), torch.randn(3, 4)
    (layer.weight * upstream).sum().backward()
    for i in range(3):
        for j in range(4):
            v = layer.weight_v[i, j].item()
            assert layer.weight[i, j].item() == pytest.approx(a * math.atan(v / b), rel=1e-5)
            slope = a / b / (1 + (v / b) ** 2)
            assert layer.weight_v.grad[i, j].item() == pytest.approx(upstream[i, j].item() * slope, rel=1e-4)


@pytest.mark.parametrize("headroom", [1.01, 2.0, 50.0])
@pytest.mark.parametrize("slope", [0.3, 1.0])
def test_headroom_bounds_and_slope_is_the_slope_at_zero(headroom: float, slope: float) -> None:
    weight = torch.randn(20, 30)
    layer = companded(weight, headroom=headroom, slope=slope)
    assert torch.equal(layer.weight, weight)
    bound = headroom * weight.abs().max().item()
    small = layer.weight_v[weight.abs() < 1e-2 * weight.abs().max()] * slope
    torch.testing.assert_close(small, weight[weight.abs() < 1e-2 * weight.abs().max()], rtol=1e-3, atol=0)
    with torch.no_grad():
        layer.weight_v.fill_(1e9)
    assert layer.weight.max().item() == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_start_is_the_weight_bit_for_bit(dtype: torch.dtype, kind: type) -> None:
    """Also after a copy to another dtype and back to the weight: nothing but `weight_v` is cast."""
    weight = (torch.randn(300, 200) * 10.0 ** torch.randint(-6, 2, (300, 1))).to(dtype)
    layer = companded(weight, kind)
    assert torch.equal(layer.weight, weight) and layer.weight.dtype == dtype
    bare = torch.atan(layer.weight_v.double() / layer.weight_b.double()) * layer.weight_a.double()
    assert not torch.equal(bare.to(dtype), weight) and (bare - weight.double()).abs().max() < 0.01 * weight.abs().max()
    layer.to(torch.bfloat16)
    assert layer.weight_a.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(layer.weight.float(), weight.float(), rtol=3e-2, atol=1e-4)


def test_a_layer_of_zeros_and_one_that_is_not_finite() -> None:
    layer = companded(torch.zeros(2, 3))
    assert torch.equal(layer.weight, torch.zeros(2, 3)) and layer.weight_a.item() == pytest.approx(4 / math.pi)
    with pytest.raises(ValueError, match="not finite"):
        companded(torch.tensor([[1.0, math.inf]]))


def test_learned_scales_take_gradients_and_stay_out_of_checkpoints() -> None:
    tiny = build("bert")
    model = tiny.model.train()
    stock = set(model.state_dict())
    patch_model(model, "weight_compander", learned=True)
    assert set(model.state_dict()) == stock
    scales = [p for name, p in model.named_parameters() if name.endswith("weight_scales")]
    assert len(scales) == 12 and all(not p.any() and p.shape == (2,) for p in scales)
    sum(o.square().sum() for o in forward(model, tiny.inputs)).backward()
    assert all(p.grad is not None and p.grad.abs().min() > 0 for p in scales)
    layer = model.encoder.layer[0].output.dense
    with torch.no_grad():
        before = layer.weight - layer.weight_offset
        scales_of = dict(layer.named_parameters())["weight_scales"]
        scales_of[0] = math.log(2.0)  # a twice as large: so are all weights
    torch.testing.assert_close(layer.weight - layer.weight_offset, 2 * before)


def test_unpatching_keeps_what_was_trained() -> None:
    tiny = build("llama")
    model = patch_model(tiny.model.train(), "weight_compander", branch="ffn")
    parameters = [p for name, p in model.named_parameters() if name.endswith("weight_v")]
    assert len(parameters) == 6  # gate, up and down of two layers
    optimizer = torch.optim.SGD(parameters, 0.5)
    sum(o.square().mean() for o in forward(model, tiny.inputs)).backward()
    weight = model.layers[0].mlp.up_proj.weight.clone()
    optimizer.step()
    trained, outputs = model.layers[0].mlp.up_proj.weight.clone(), forward(model.eval(), tiny.inputs)
    assert not torch.equal(weight, trained)
    unpatch_model(model)
    layer = model.layers[0].mlp.up_proj
    assert type(layer) is nn.Linear and list(layer._parameters) == ["weight", "bias"] and not layer._buffers
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad and torch.equal(layer.weight, trained)
    assert all(torch.equal(a, b) for a, b in zip(outputs, forward(model, tiny.inputs), strict=True))


def test_a_wider_weight_is_loaded_and_the_bound_goes_with_it() -> None:
    layer, wide = companded(torch.randn(4, 4)), 100 * torch.randn(4, 4)
    layer.load_state_dict({"weight": wide, "bias": torch.ones(4)})
    assert torch.equal(layer.weight, wide) and torch.equal(layer.bias, torch.ones(4))
    assert layer.weight_a.item() == pytest.approx(4 / math.pi * wide.abs().max().item())
    start = make_dense(layer)
    assert torch.equal(layer.weight, wide) and set(start) == {"weight_v", "weight_offset", "weight_a", "weight_b"}


def test_settings_and_what_is_told() -> None:
    for settings, text in (
        ({"headroom": 1.0}, "must be above 1"),
        ({"headroom": 0.5}, "headroom=0.5 is out of range"),
        ({"slope": 0.0}, "slope=0.0 above 0"),
        ({"branch": "mlp"}, "branch='mlp' is not known"),
        ({"schedule": "linear"}, "has no rate"),
    ):
        with pytest.raises(ValueError, match=text):
            WeightCompander(**settings)
    with pytest.raises(TypeError, match="learned must be True or False"):
        WeightCompander(learned=1)  # type: ignore[arg-type]
    model = build("bert").model
    largest = model.encoder.layer[0].output.dense.weight.abs().max().item()
    text = describe(patch_model(model, "weight_compander")).rows[0].notes  # type: ignore[attr-defined]
    assert f"encoder.layer.0.output.dense |w| < {2 * largest:.3g}" in text
