"""Decoupled L2-SP: its step against a slow loop, the head, resume, and where there is nothing to anchor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from hf_reg import RegularizedTrainer
from hf_reg.optimizers import DecoupledL2SP

from ..distributed.heads import make
from ..test_trainer import trainer
from .runs import RATE, backward, cut, run, two_halves, weights
from .said import said


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classifier = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x))


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_against_a_slow_loop(beta: float) -> None:
    def groups(net: Net) -> list[dict[str, Any]]:
        return [{"params": net.body.parameters(), "lr": 0.1}, {"params": net.classifier.parameters(), "lr": 0.2}]

    ours, plain = Net(), Net()
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    one = torch.optim.AdamW(groups(ours), weight_decay=0.0)
    two = torch.optim.AdamW(groups(plain), weight_decay=0.0)
    DecoupledL2SP(alpha=0.5, beta=beta).attach(one, ours)
    for step in range(4):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((ours, one), (plain, two)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 2)
        for name, p in plain.named_parameters():
            flat, anchor = p.data.flatten(), start[name].flatten()
            lr = 0.2 if "classifier" in name else 0.1 / (step + 1)
            for i in range(len(flat)):
                flat[i] -= lr * beta * flat[i] if "classifier" in name else lr * 0.5 * (flat[i] - anchor[i])
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name
    assert (ours.body.weight - start["body.weight"]).norm() > 1e-3


def test_a_weight_without_gradient_stays() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    companion = DecoupledL2SP(alpha=1.0)
    companion.attach(optimizer, net)
    with torch.no_grad():
        net.body.weight.add_(1.0)
    before = net.body.weight.detach().clone()
    net.classifier(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(net.body.weight, before)


def test_fp16_overflow_leaves_the_step_out_in_fused_optimizers_too() -> None:
    for fused in (True, False):
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused, weight_decay=0.0)
        companion = DecoupledL2SP(alpha=1.0)
        companion.attach(optimizer, net)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for x, moves in ((torch.ones(1, 4) * torch.inf, False), (torch.ones(1, 4), True)):
            with torch.no_grad():
                net.body.weight.add_(1.0)
            before = net.body.weight.detach().clone()
            optimizer.zero_grad()
            scaler.scale(net(x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(net.body.weight, before) != moves, (fused, moves)


@pytest.mark.parametrize("cls", [Trainer, RegularizedTrainer])
@pytest.mark.parametrize("accumulation", [1, 8])
def test_both_trainers_under_accumulation(cls: type, accumulation: int) -> None:
    """Two steps; what a step adds to SGD's is the pull, whatever the gradient is."""
    found = weights(
        run("unused", cls, companions=DecoupledL2SP(alpha=3.0, beta=2.0), max_steps=2, **cut(accumulation))
    )
    start, model = make("classes/bert"), make("classes/bert")
    times = accumulation if cls is Trainer else 1  # see tests.distributed.test_gradients
    for _ in range(2):
        model.zero_grad()
        backward(model=model)
        for (name, p), w0 in zip(model.named_parameters(), start.parameters(), strict=True):
            with torch.no_grad():
                p -= RATE * times * p.grad  # type: ignore[operator]
                p -= RATE * 2.0 * p if "classifier" in name else RATE * 3.0 * (p - w0)
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p, atol=1e-6), name


@pytest.mark.parametrize("cls", [Trainer, RegularizedTrainer])
def test_ten_steps_are_five_and_five(tmp_path: Any, cls: type) -> None:
    spec = {"alpha": 2.0, "beta": 1.0}
    whole, halves = two_halves(
        tmp_path, cls=cls, companions=lambda: DecoupledL2SP(**spec) if cls is Trainer else {"decoupled_l2_sp": spec}
    )
    for name in whole:
        assert torch.equal(whole[name], halves[name]), name


def test_the_checkpoint_has_the_anchor_whatever_model_resumes(tmp_path: Any) -> None:
    spec = {"decoupled_l2_sp": {"alpha": 2.0}}
    run(tmp_path, companions=spec, save_strategy="steps", save_steps=1, max_steps=2)
    saved = load_file(tmp_path / "checkpoint-1" / "hf_reg_penalties.safetensors")
    start = dict(make("classes/bert").named_parameters())
    assert {name.split("anchor.")[1] for name in saved} == {name for name in start if "classifier" not in name}
    assert all(torch.equal(one, start[name.split("anchor.")[1]]) for name, one in saved.items())
    changed = make("classes/bert")
    with torch.no_grad():
        for p in changed.parameters():
            p.add_(1.0)
    made = run(tmp_path, companions=spec, model=changed, max_steps=2, resume=str(tmp_path / "checkpoint-1"))
    wanted = run(tmp_path / "other", companions=spec, max_steps=2)
    assert all(torch.equal(p, weights(wanted)[name]) for name, p in weights(made).items())


def test_a_loop_resumes_from_its_state() -> None:
    net, later = Net(), Net()
    first = DecoupledL2SP()
    first.attach(torch.optim.SGD(net.parameters(), lr=0.1), net)
    with torch.no_grad():
        for p in later.parameters():
            p.add_(0.5)
    second = DecoupledL2SP()
    second.load_state_dict(first.state_dict())
    second.attach(torch.optim.SGD(later.parameters(), lr=0.1), later)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_memory_is_one_copy() -> None:
    net = Net()
    companion = DecoupledL2SP()
    companion.attach(torch.optim.SGD(net.parameters(), lr=0.1), net)
    assert sum(one.numel() for one in companion.state_dict().values()) == sum(p.numel() for p in net.body.parameters())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"lora_A.*nothing to anchor"):
        trainer("lora/llama", companions="decoupled_l2_sp")
    net = Net()

    def optimizer(of: nn.Module = net, lr: Any = 0.1, **settings: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(of.parameters(), lr=lr, **settings)

    for make_it, text in (
        (lambda: DecoupledL2SP(alpha=-1), "alpha=-1 is out of range"),
        (lambda: DecoupledL2SP().attach(optimizer()), "needs the model"),
        (lambda: DecoupledL2SP().attach(optimizer(Net()), net), "not of this model"),
        (lambda: DecoupledL2SP(alpha=20.0).attach(optimizer(), net), r"lr \* alpha=2.0 is out of range"),
        (lambda: DecoupledL2SP(new="*").attach(optimizer(), net), "nothing is left to anchor"),
        (lambda: DecoupledL2SP(scope="*.none").attach(optimizer(), net), "No trainable parameter"),
        (lambda: DecoupledL2SP().attach(optimizer(net.classifier), net), "no anchored parameter"),
    ):
        with pytest.raises(ValueError, match=text):
            make_it()
    grown, companion = Net(), DecoupledL2SP()
    companion.prepare(grown)
    grown.body = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"the anchor of body.weight is \(4, 4\), but the weight is \(5, 4\) now"):
        companion.attach(optimizer(grown), grown)
    with said() as lines:
        DecoupledL2SP().attach(optimizer(weight_decay=0.01), net)
    assert "weight_decay=0.01 pulls the same weights towards 0" in lines[0]
