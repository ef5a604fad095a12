"""StableMax: fp32 against the authors' fp64 form, and as a task loss of both trainers under accumulation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_reg import RegularizedTrainer
from hf_reg.optimizers import StableMaxLoss, stablemax_log_probs

from ..distributed.heads import difference, make, rows
from .runs import cut, gradients, run


def slow(logits: torch.Tensor) -> torch.Tensor:
    """The definition, a number at a time in fp64."""

    def s(z: float) -> float:
        return z + 1 if z >= 0 else 1 / (1 - z)

    rows_of = [[s(z) for z in row] for row in logits.double().flatten(0, -2).tolist()]
    return torch.tensor([[math.log(one / sum(row)) for one in row] for row in rows_of]).view(logits.shape)


def test_fp32_is_the_fp64_definition() -> None:
    torch.manual_seed(0)
    logits = torch.cat([torch.randn(20, 7) * scale for scale in (1e-6, 1, 100, 1e6)])
    found = stablemax_log_probs(logits)
    assert found.dtype == torch.float32 and torch.allclose(found, slow(logits), rtol=1e-6, atol=1e-6)
    assert torch.allclose(stablemax_log_probs(logits.double()).float(), found, atol=1e-6, rtol=1e-6)
    assert torch.equal(found[20:].argmax(-1), logits[20:].argmax(-1))
    assert not torch.allclose(stablemax_log_probs(logits + 1), found, atol=1e-2)  # not shift-invariant
    assert stablemax_log_probs(torch.tensor([0.0, -torch.inf]))[1] == -torch.inf


def test_gradients() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(stablemax_log_probs, (logits,))
    zeros = torch.zeros(1, 3, requires_grad=True)  # a head of zeros must be able to start
    (-stablemax_log_probs(zeros)[0, 0]).backward()
    assert torch.allclose(zeros.grad, torch.tensor([[-2 / 3, 1 / 3, 1 / 3]]))


def test_values() -> None:
    loss = StableMaxLoss(make("tags/bert"))
    logits, labels = torch.randn(2, 5, 3), torch.tensor([[0, 1, -100, 2, -100], [-100, -100, 1, 1, -100]])
    picked = [-slow(logits)[i, j, labels[i, j]] for i in range(2) for j in range(5) if labels[i, j] >= 0]
    assert loss({"logits": logits}, labels) == pytest.approx(float(sum(picked)) / 5, rel=1e-5)
    assert loss((logits,), labels, 7) == pytest.approx(float(sum(picked)) / 7, rel=1e-5)
    assert loss({"logits": logits}, torch.full((2, 5), -100)) == 0
    precise = StableMaxLoss(make("tags/bert"), dtype="float64")
    assert precise({"logits": logits}, labels) == pytest.approx(float(loss({"logits": logits}, labels)), rel=1e-6)
    causal = StableMaxLoss(make("tokens/llama"))
    assert causal({"logits": logits}, labels) == pytest.approx(
        float(loss({"logits": logits[:, :-1]}, labels[:, 1:])), rel=1e-6
    )


def wanted(head: str) -> dict[str, torch.Tensor]:
    """The gradient of the whole batch, by the definition."""
    model, part = make(head), rows(head)
    batch = {key: torch.stack([row[key] for row in part]) for key in part[0]}
    labels = batch.pop("labels")
    logits = model(**batch).logits
    if head == "tokens/llama":
        logits, labels = logits[:, :-1], labels[:, 1:]
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
    logs = (s / s.sum(-1, keepdim=True)).log()
    chosen = labels != -100
    (-logs[chosen].gather(-1, labels[chosen][:, None]).mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cls", [Trainer, RegularizedTrainer])
@pytest.mark.parametrize("head", ["classes/bert", "tags/bert", "tokens/llama"])
def test_a_step_is_that_of_its_whole_batch(cls: type, head: str) -> None:
    for accumulation in (1, 8):
        [found] = gradients(accumulation, None, cls, head=head, compute_loss_func=StableMaxLoss(make(head)))
        assert difference(found, wanted(head)) < 1e-5, accumulation


@pytest.mark.parametrize("accumulation", [1, 8])
def test_a_penalty_beside_it_keeps_its_strength(accumulation: int) -> None:
    settings: dict[str, Any] = {"head": "tags/bert", "compute_loss_func": StableMaxLoss(make("tags/bert"))}
    [found] = gradients(accumulation, None, penalties={"l2": 0.5}, **settings)
    model = make("tags/bert")
    expected = wanted("tags/bert")
    for name, p in model.named_parameters():
        if name in expected:
            expected[name] = expected[name] + 0.5 * p.detach()
    assert difference({n: found[n] for n in expected}, expected) < 1e-5


def test_evaluation_has_the_same_loss() -> None:
    made = run("unused", head="tags/bert", compute_loss_func=StableMaxLoss(make("tags/bert")), **cut(2))
    metrics = made.evaluate(rows("tags/bert"))
    model, part = made.model.eval(), rows("tags/bert")
    batch = {key: torch.stack([row[key] for row in part]) for key in part[0]}
    with torch.no_grad():
        value = made.compute_loss_func(model(**batch), batch["labels"])
    assert metrics["eval_loss"] == pytest.approx(float(value), rel=1e-5)


def test_refusals(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification, LlamaForCausalLM

    make("tokens/llama").save_pretrained(tmp_path / "lm")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="was loaded with a language-model head from"):
        StableMaxLoss(loaded)
    StableMaxLoss(loaded, from_scratch=True)
    make("classes/bert").bert.save_pretrained(tmp_path / "encoder")
    StableMaxLoss(BertForSequenceClassification.from_pretrained(tmp_path / "encoder"))  # a new head
    loss = StableMaxLoss(make("classes/bert"))
    with pytest.raises(ValueError, match="no labels"):
        loss({"logits": torch.ones(2, 3)}, None)
    with pytest.raises(ValueError, match=r"labels \(2,\) \(torch.float32\)"):
        loss({"logits": torch.ones(2, 3)}, torch.ones(2))
    with pytest.raises(ValueError, match=r"expected classes of shape \(2,\)"):
        loss({"logits": torch.ones(2, 3)}, torch.ones(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="dtype='half' is not known"):
        StableMaxLoss(make("classes/bert"), dtype="half")
