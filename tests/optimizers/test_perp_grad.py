"""The orthogonal gradient: its mathematics, in a loop, in both trainers, and on what it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_reg import RegularizedTrainer
from hf_reg.optimizers import PerpGrad, perpendicular_

from ..distributed.heads import difference, make
from ..test_trainer import trainer
from ..tiny_runs import arguments as settings_of
from ..tiny_runs import refused, trained, write
from .runs import Taken, backward, cut, gradients, other, run, two_halves, weights


def with_gradient(weight: torch.Tensor, gradient: torch.Tensor) -> nn.Parameter:
    made = nn.Parameter(weight)
    made.grad = gradient.clone()
    return made


def slow(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The paper's two lines, an element at a time, in Python's own numbers."""
    w, g = weight.flatten().tolist(), gradient.flatten().tolist()
    share = sum(a * b for a, b in zip(w, g, strict=True)) / (sum(a * a for a in w) + 1e-30)
    left = [b - share * a for a, b in zip(w, g, strict=True)]
    norm, new = (sum(one * one for one in of) ** 0.5 for of in (g, left))
    return torch.tensor([one * norm / (new + 1e-30) for one in left]).view(gradient.shape)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4)])
def test_against_a_slow_loop(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    p = with_gradient(w, g)
    perpendicular_([p])
    assert torch.allclose(p.grad, slow(w, g), atol=1e-6)
    assert (p.grad * w).sum().abs() < 1e-5 and p.grad.norm() == pytest.approx(g.norm().item(), rel=1e-5)


def test_what_has_nothing_orthogonal() -> None:
    g = torch.tensor([[0.3, -2.0], [1.0, 0.1]])
    zeros, one = with_gradient(torch.zeros(2, 2), g), with_gradient(torch.tensor([2.0]), torch.tensor([0.7]))
    parallel, still = with_gradient(-g * 1.7, g), with_gradient(g, torch.zeros(2, 2))
    perpendicular_([zeros, one, parallel, still, nn.Parameter(g)])
    assert torch.equal(zeros.grad, g) and torch.equal(one.grad, torch.tensor([0.7]))
    assert not parallel.grad.any() and not still.grad.any()
    broken = with_gradient(g, g * torch.nan)
    perpendicular_([broken])
    assert broken.grad.isnan().all()  # never hidden


def test_low_precision_weights() -> None:
    w, g = torch.randn(64, 8), torch.randn(64, 8)
    p = with_gradient(w.bfloat16(), g.bfloat16())
    perpendicular_([p])
    assert p.grad.dtype == torch.bfloat16 and torch.allclose(p.grad.float(), slow(w, g), atol=0.05)


def test_it_commutes_with_clipping_and_with_a_loss_scale() -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(4, 3), torch.randn(4, 3)), (torch.randn(7), torch.randn(7))]
    after, before, scaled = ([with_gradient(w.clone(), g) for w, g in pairs] for _ in range(3))
    nn.utils.clip_grad_norm_(after, 0.5)
    perpendicular_(after)
    perpendicular_(before)
    nn.utils.clip_grad_norm_(before, 0.5)
    for p in scaled:
        p.grad *= 1024
    perpendicular_(scaled)
    nn.utils.clip_grad_norm_(scaled, 0.5)
    for a, b, c in zip(after, before, scaled, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-7) and torch.allclose(a.grad, c.grad, atol=1e-7)


def test_a_loop_with_several_groups() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD([{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "lr": 0.2}])
    companion = PerpGrad(parameters="matrices")
    companion.attach(optimizer)
    companion.attach(optimizer)  # twice is once
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    layer(torch.randn(3, 4)).square().sum().backward()
    w, b, g, h = (one.detach().clone() for one in (layer.weight, layer.bias, layer.weight.grad, layer.bias.grad))
    optimizer.step()
    assert torch.allclose(layer.weight, w - 0.1 * slow(w, g), atol=1e-6)
    assert torch.equal(layer.bias, b - 0.2 * h)
    companion.detach()
    layer.weight.grad = g.clone()
    optimizer.step()
    assert torch.equal(layer.weight.grad, g)


@pytest.mark.parametrize(("cls", "accumulation"), [(Trainer, 1), (RegularizedTrainer, 1), (RegularizedTrainer, 8)])
def test_both_trainers_under_accumulation(cls: type, accumulation: int) -> None:
    model = backward()
    perpendicular_(model.parameters())
    wanted = {name: p.grad for name, p in model.named_parameters()}
    [found] = gradients(accumulation, PerpGrad(), cls)
    assert difference(found, wanted) < 2e-6
    assert difference(gradients(accumulation, None, cls)[0], wanted) > 0.01


def test_by_name_and_as_a_recipe_says_it() -> None:
    made = trainer(max_steps=1, companions="{perp_grad: {parameters: matrices}}")
    [found] = [one for one in made.callback_handler.callbacks if isinstance(one, PerpGrad)]
    assert found.parameters == "matrices"
    seen = Taken()
    made.add_callback(seen)
    made.train()
    for name, (weight, gradient) in seen.steps[0].items():
        if weight.dim() > 1 and weight.any():
            cosine = torch.cosine_similarity(weight.flatten(), gradient.flatten(), 0)
            assert abs(cosine) < 1e-4, name
    assert not made.optimizer.optimizer._optimizer_step_pre_hooks  # gone after training


def test_ten_steps_are_five_and_five(tmp_path: Any) -> None:
    whole, halves = two_halves(tmp_path, companions="perp_grad")
    for name in whole:
        assert torch.equal(whole[name], halves[name]), name


def test_refusals() -> None:
    with pytest.raises(ValueError, match="parameters='some' is not known"):
        PerpGrad(parameters="some")
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got Linear"):
        PerpGrad().attach(nn.Linear(2, 2))  # type: ignore[arg-type]
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        perpendicular_(table.parameters())
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.LBFGS(layer.parameters())
    PerpGrad().attach(optimizer)
    with pytest.raises(ValueError, match=r"step\(closure\) computes gradients of its own"):
        optimizer.step(lambda: layer.weight.sum())
    for spec, text in (
        ("perpgrad", "Unknown companion 'perpgrad'. Did you mean 'perp_grad'"),
        ({"perp_grad": {"scope": "x"}}, "perp_grad has no setting 'scope'"),
        (["perp_grad", PerpGrad()], "'perp_grad' is given twice"),
        (3, "expected a name"),
        ({"perp_grad": 3}, "expected a dict of settings"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            trainer(companions=spec)
    with pytest.raises(ValueError, match="updates each weight within the backward pass"):
        trainer(optim="galore_adamw_layerwise", optim_target_modules=["query"], companions="perp_grad")
    with pytest.raises(ValueError, match="FSDP 1 flattens"):
        flat = nn.Parameter(torch.ones(3))
        flat._is_flat_param = True  # type: ignore[attr-defined]
        PerpGrad().attach(torch.optim.SGD([flat]))


def test_large_weights_lose_no_precision() -> None:
    torch.manual_seed(0)
    w, g = torch.randn(3_000_000) + 0.1, torch.randn(3_000_000)
    p, parallel = with_gradient(w, g + 3 * w), with_gradient(w, 3 * w)
    perpendicular_([p, parallel])
    assert torch.cosine_similarity(p.grad.double(), w.double(), 0).abs() < 1e-6
    assert p.grad.norm() == pytest.approx((g + 3 * w).norm().item(), rel=1e-5)
    assert not parallel.grad.any()


def test_a_recipe_names_it(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "sequence-classification")
    trained(write(tmp_path, "sequence-classification", train=settings | {"companions": {"perp_grad": {}}}))
    wrong = write(tmp_path, "sequence-classification", train=settings | {"companions": "perp"})
    assert "Unknown companion 'perp'" in refused(wrong)


def test_bf16_autocast_with_every_companion() -> None:
    spec = {"perp_grad": {}, "decoupled_l2_sp": {}, "gradient_dropout": {}}
    made = run("unused", companions=spec, teacher=other(), bf16=True, max_steps=2, **cut(2))
    assert all(p.isfinite().all() for p in weights(made).values())
    assert any(not torch.equal(p, q) for p, q in zip(made.model.parameters(), make("classes/bert").parameters(),
               strict=True))  # fmt: skip
