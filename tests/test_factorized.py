"""Factorized layers: truncated SVD at the start, gradients of the dense composition, rank, Frobenius decay."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_reg import describe, patch_model, unpatch_model
from hf_reg.patches.factorized import Factorized
from hf_reg.penalties import FrobeniusDecay
from hf_reg.seams.factors import FactorizedLayer, factorize
from hf_reg.seams.reparameterized import named_layers, reparameterize

from .architectures import build, forward


def factorized(layer: nn.Module, rank: float) -> FactorizedLayer:
    patch = Factorized(rank=rank)
    reparameterize(layer, FactorizedLayer, patch, patch.initial(layer, layer.weight.detach()))
    return layer  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (300, 280)])  # the last one by Krylov steps
def test_the_start_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    """Against numpy, sum by sum; the factors are balanced: U^T U = V^T V = S."""
    weight = torch.randn(shape) @ torch.diag(torch.arange(1, shape[1] + 1) ** -0.5)
    start = factorize(weight, 5)
    left, values, right = np.linalg.svd(weight.double().numpy())
    best = sum(values[i] * np.outer(left[:, i], right[i]) for i in range(5))
    u, v = start["weight_u"].detach(), start["weight_v"].detach()
    assert u.shape == (shape[0], 5) and v.shape == (5, shape[1])
    assert ((u @ v).double() - torch.from_numpy(best)).norm() < 1e-4 * np.linalg.norm(best)
    spectrum = torch.diag(torch.from_numpy(values[:5])).float()
    torch.testing.assert_close(u.mT @ u, spectrum, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(v @ v.mT, spectrum, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_output_and_gradients_are_those_of_the_dense_composition(kind: type, bias: bool) -> None:
    if kind is Conv1D and not bias:
        pytest.skip("Conv1D always has a bias")
    layer = nn.Linear(6, 9, bias=bias) if kind is nn.Linear else Conv1D(9, 6)
    layer = factorized(layer.double(), 0.5)
    assert layer.rank == 3 and type(layer).__name__ == kind.__name__
    x, upstream = torch.randn(2, 5, 6, dtype=torch.double), torch.randn(2, 5, 9, dtype=torch.double)
    inner = {**dict(layer.named_parameters())}
    y = layer(x)
    found = torch.autograd.grad((y * upstream).sum(), list(inner.values()))
    matrix = layer.weight_u @ layer.weight_v
    torch.testing.assert_close(layer.weight, matrix if kind is nn.Linear else matrix.mT)
    dense = x @ matrix.mT + (layer.bias if bias else 0)
    wanted = torch.autograd.grad((dense * upstream).sum(), list(inner.values()))
    torch.testing.assert_close(y, dense)
    torch.testing.assert_close(found, wanted)


def test_a_hook_on_components_reaches_the_rank_dimension() -> None:
    layer = factorized(nn.Linear(6, 8), 3)
    kept = torch.tensor([1.0, 0.0, 1.0])
    layer.components.register_forward_hook(lambda module, args, output: output * kept)
    x = torch.randn(4, 6)
    wanted = x @ (layer.weight_u * kept @ layer.weight_v).mT + layer.bias
    torch.testing.assert_close(layer(x), wanted)


def test_no_dense_weight_is_made_in_a_forward() -> None:
    tiny = build("llama")
    model = patch_model(tiny.model.train(), "factorized")
    for _, layer in named_layers(model):
        layer.dense = lambda: pytest.fail("the dense weight was computed")  # type: ignore[method-assign]
    sum(o.square().sum() for o in forward(model, tiny.inputs)).backward()


def test_describe_tells_what_is_cut() -> None:
    model = build("bert").model
    weight = model.encoder.layer[1].output.dense.weight.detach().clone()
    row = describe(patch_model(model, "factorized", rank=4)).rows[0]  # type: ignore[attr-defined]
    rest = torch.linalg.svdvals(weight)[4:].norm() / weight.norm()
    assert f"encoder.layer.1.output.dense rank 4, cut {rest:.2g}" in row.notes
    assert row.patched == row.found == 12
    found = (model.encoder.layer[1].output.dense.weight.detach() - weight).norm() / weight.norm()
    assert found.item() == pytest.approx(rest.item(), rel=1e-3)


def test_unpatching_gives_dense_layers_with_the_product() -> None:
    tiny = build("gpt2")
    model = patch_model(tiny.model.eval(), "factorized", layers=[0])
    layer, outputs = model.h[0].mlp.c_fc, forward(model, tiny.inputs)
    with torch.no_grad():
        layer.weight_u += 0.01
    product, stock = layer.weight.detach().clone(), model.state_dict()["h.0.mlp.c_fc.weight"]
    assert torch.equal(product, stock) and not torch.equal(outputs[0], forward(model, tiny.inputs)[0])
    outputs = forward(model, tiny.inputs)
    unpatch_model(model)
    assert type(layer) is Conv1D and list(layer._parameters) == ["weight", "bias"] and not layer._modules
    assert torch.equal(layer.weight, product) and layer.weight.is_contiguous() and layer.weight.requires_grad
    for a, b in zip(outputs, forward(model, tiny.inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_loading_the_product_as_it_is_keeps_the_pair_and_another_is_factorized() -> None:
    layer = factorized(nn.Linear(8, 8), 4)
    with torch.no_grad():
        layer.weight_u *= 3  # no longer balanced
    pair = layer.weight_u.clone()
    layer.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight_u, pair)
    low = torch.randn(8, 4) @ torch.randn(4, 8)
    parameter = layer.weight_u
    layer.load_state_dict({"weight": low, "bias": torch.zeros(8)})
    torch.testing.assert_close(layer.weight, low, rtol=1e-4, atol=1e-4)
    assert layer.weight_u is parameter and not layer.bias.any()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \(3, 8\)"):
        layer.load_state_dict({"weight": torch.zeros(3, 8), "bias": torch.zeros(8)})
    with pytest.raises(RuntimeError, match='Missing key.*"weight"'):
        layer.load_state_dict({"bias": torch.zeros(8)})
    with pytest.raises(RuntimeError, match='Unexpected key.*"other"'):
        layer.load_state_dict({"weight": low, "bias": torch.zeros(8), "other": torch.zeros(8)})


def test_frobenius_decay_of_the_products() -> None:
    model = patch_model(build("bert").model, "factorized", branch="ffn")
    penalty = FrobeniusDecay(kind="factorized")
    layers = [layer for _, layer in named_layers(model)]
    assert len(layers) == 4
    wanted = sum(layer.weight.square().sum() / 2 for layer in layers)
    value = penalty(model, {}, None)
    torch.testing.assert_close(value, wanted)
    value.backward()
    u, v = layers[0].weight_u, layers[0].weight_v  # type: ignore[union-attr]
    torch.testing.assert_close(u.grad, u @ v @ v.mT)  # lambda U V^T V (METHODS: 6.3), V^T being `v`
    assert len(penalty.undecayed(model)) == 8
    assert len(FrobeniusDecay(kind="factorized", scope="*layer.0*").undecayed(model)) == 4
    assert not FrobeniusDecay().undecayed(model)
    unpatch_model(model)
    with pytest.raises(ValueError, match="no 'factorized' product"):
        penalty(model, {}, None)


def test_ranks() -> None:
    model = build("bert").model
    for rank, text in ((0, "rank=0; give at least 1"), (0.0, "leaves nothing"), (1.5, "rank=1.5 is out of range")):
        with pytest.raises(ValueError, match=text):
            Factorized(rank=rank)
    with pytest.raises(TypeError, match="rank must be a number"):
        Factorized(rank=True)
    with pytest.raises(ValueError, match=r"rank=4000, but encoder.layer.0.\S+ is \d+ x \d+. Give at most"):
        patch_model(model, "factorized", rank=4000)
    with pytest.warns(UserWarning, match="cost more than one in 12 of 12 layers"):
        patch_model(model, "factorized", rank=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, "factorized", rank=0.25)
    ranks = {layer.rank for _, layer in named_layers(model)}  # type: ignore[attr-defined]
    assert ranks == {model.config.hidden_size // 4}
    with warnings.catch_warnings(), pytest.raises(UserWarning):  # a warning that is an error: nothing has changed
        warnings.simplefilter("error")
        patch_model(model, "factorized", rank=1.0)
    assert {layer.rank for _, layer in named_layers(model)} == ranks  # type: ignore[attr-defined]
