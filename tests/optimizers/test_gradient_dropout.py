"""Gradient dropout: its mathematics, in a loop, and in the trainer with a second gradient of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_reg import RegularizedTrainer
from hf_reg.optimizers import GradientDropout, gradient_dropout
from hf_reg.penalties import consistency

from ..distributed.heads import difference, make, rows
from ..test_trainer import trainer
from .runs import backward, cut, gradients, other, run, two_halves


def slow(task: torch.Tensor, distillation: torch.Tensor, uniform: torch.Tensor, rate: float) -> torch.Tensor:
    found = []
    for a, b, u in zip(*(one.flatten().tolist() for one in (task, distillation, uniform)), strict=True):
        sign = (a > 0) - (a < 0)
        keep = 0.5 * (1 + sign * (a + b) / (abs(a) + abs(b) + 1e-8))
        found.append(a * ((1 - rate) + rate * (1 if keep > u else 0)))
    return torch.tensor(found).view(task.shape)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_against_a_slow_loop(rate: float) -> None:
    torch.manual_seed(0)
    a, b, u = torch.randn(40, 5), torch.randn(40, 5), torch.rand(40, 5)
    found = gradient_dropout(a, b, u, rate)
    assert torch.allclose(found, slow(a, b, u, rate), atol=1e-7)
    assert rate == 0 or 0 < (found != a).float().mean() < 1
    assert torch.equal(gradient_dropout(a, a, u, rate), a)  # where both agree nothing is dropped
    assert torch.equal(gradient_dropout(1024 * a, 1024 * b, u, rate), 1024 * found)  # a loss scale changes nothing
    assert not gradient_dropout(a, -a * 1e6, u.clamp(min=1e-4), 1.0).any()


def both(accumulation: int = 1, model: Any = None) -> tuple[nn.Module, dict[nn.Parameter, torch.Tensor]]:
    """A model with the task's gradients, and those of the distillation, both of the whole batch."""
    model, part = model or make("classes/bert"), rows("classes/bert")
    batch = {key: torch.stack([row[key] for row in part]) for key in part[0]}
    with torch.no_grad():
        target = other().eval()(**batch).logits
    kl = consistency(model(**batch).logits, target, temperature=1.0)
    held = list(model.parameters())
    grads = torch.autograd.grad(kl, held, allow_unused=True)
    return backward(model=model), {
        p: torch.zeros_like(p) if g is None else g for p, g in zip(held, grads, strict=True)
    }


def test_a_loop_is_the_formula_with_the_gradients_of_the_whole_batch() -> None:
    model, kl = both()
    dropping = GradientDropout(rate=0.6, seed=5)
    dropping.collect(sum((p * g).sum() for p, g in kl.items()), model.parameters())  # whose gradient is g
    task = {name: p.grad.clone() for name, p in model.named_parameters()}
    dropping.apply(model.parameters(), step=3)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        share = (once[name] / task[name])[task[name] != 0]
        assert ((share - 1).abs() < 1e-5).logical_or((share - 0.4).abs() < 1e-5).all(), name
        agree = (task[name].sign() == kl[p].sign()) & (task[name].abs() > 1e-5)
        assert torch.allclose(once[name][agree], task[name][agree])
    dropped = torch.cat([(once[name] != task[name]).flatten() for name in task])
    assert 0.02 < dropped.float().mean() < 0.9
    for step, same in ((3, True), (4, False)):  # the masks are of the step
        for name, p in model.named_parameters():
            p.grad = task[name].clone()
        dropping.collect(sum((p * g).sum() for p, g in kl.items()), model.parameters())
        dropping.apply(model.parameters(), step=step)
        assert all(torch.equal(p.grad, once[name]) for name, p in model.named_parameters()) == same


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_the_trainer_takes_both_gradients_of_the_whole_batch(accumulation: int) -> None:
    model, kl = both()
    task = {name: p.grad.clone() for name, p in model.named_parameters()}
    dropping = GradientDropout(rate=0.7)
    dropping.collect(sum((p * g).sum() for p, g in kl.items()), model.parameters())
    dropping.apply(model.parameters(), 0, seed=42)
    wanted = {name: p.grad for name, p in model.named_parameters()}
    [found] = gradients(accumulation, {"gradient_dropout": {"rate": 0.7}}, teacher=other())
    assert difference(wanted, task) > 0.1
    # an element whose P is within rounding of U may fall on the other side
    wrong = torch.cat([((found[n] - wanted[n]).abs() > 1e-6 + 1e-4 * wanted[n].abs()).flatten() for n in wanted])
    assert wrong.float().mean() < 1e-4


def test_clipping_comes_after() -> None:
    [free] = gradients(1, {"gradient_dropout": {}}, teacher=other())
    [clipped] = gradients(1, {"gradient_dropout": {}}, teacher=other(), max_grad_norm=1e-3)
    norm = torch.nn.utils.get_total_norm(list(free.values()))
    assert difference(clipped, {name: g * 1e-3 / norm for name, g in free.items()}) < 1e-3


def test_a_lora_s_teacher_is_its_base_and_no_term_joins_the_loss() -> None:
    plain = run("unused", head="lora/llama", max_steps=2)
    dropped = run("unused", head="lora/llama", max_steps=2, companions="gradient_dropout")
    first, second = (
        [entry["loss"] for entry in made.state.log_history if "loss" in entry] for made in (plain, dropped)
    )
    assert first[0] == second[0] and first[1] != second[1]
    assert not any("gradient_dropout" in key for entry in dropped.state.log_history for key in entry)
    assert all(not torch.equal(p, q) for (n, p), q in zip(plain.model.named_parameters(),
               dropped.model.parameters(), strict=True) if "lora_B" in n and p.requires_grad)  # fmt: skip


def test_with_penalties_the_terms_still_sum_to_the_loss() -> None:
    common: dict[str, Any] = {"head": "lora/llama", "max_steps": 2, "penalties": {"l2": 0.01, "consistency": 0.1}}
    made, plain = (run("unused", companions=one, **common, **cut(2)) for one in ("gradient_dropout", None))
    assert any(not torch.equal(p, q) for p, q in zip(made.model.parameters(), plain.model.parameters(), strict=True))
    for entry in made.state.log_history:
        if "loss" in entry:
            assert sum(v for k, v in entry.items() if k.startswith("loss_")) == pytest.approx(entry["loss"], rel=1e-5)


def test_ten_steps_are_five_and_five(tmp_path: Any) -> None:
    whole, halves = two_halves(tmp_path, companions={"gradient_dropout": {"rate": 0.7}}, teacher=other())
    for name in whole:
        assert torch.equal(whole[name], halves[name]), name


def test_refusals() -> None:
    for settings, text in (({"rate": 1.5}, "rate=1.5"), ({"temperature": 0}, "temperature=0")):
        with pytest.raises(ValueError, match=text):
            GradientDropout(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no adapter that could be switched off"):
        trainer(companions="gradient_dropout")
    with pytest.raises(ValueError, match="Give it to RegularizedTrainer as companions="):
        trainer(cls=Trainer, callbacks=[GradientDropout()])
    with pytest.raises(ValueError, match="instead of attach"):
        GradientDropout().attach(torch.optim.SGD([nn.Parameter(torch.ones(2))]))

    class Own(RegularizedTrainer):
        pass

    class OwnLoss(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    from hf_reg import RegularizerMixin

    class Mixed(RegularizerMixin, OwnLoss):
        pass

    with pytest.raises(ValueError, match="Mixed stands on a trainer that computes its loss itself"):
        trainer("lora/llama", cls=Mixed, companions="gradient_dropout")
    assert trainer("lora/llama", cls=Own, companions="gradient_dropout")
