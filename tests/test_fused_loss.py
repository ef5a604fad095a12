"""The loss in chunks against whole logits: as a function, and within the trainer against the trainer without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from hf_reg import penalties as P
from hf_reg.losses import (
    HeadSpectrum,
    LinearHead,
    RowWeights,
    fused_loss,
    top_logits_of,
)
from hf_reg.losses import fused as fused_module
from hf_reg.losses.row_terms import largest


D = torch.float64


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def logits_of(hidden: torch.Tensor, head: LinearHead) -> torch.Tensor:
    logits = functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


HEADS = {
    "plain": LinearHead(rand(200, 8, seed=1)),
    "bias and scale": LinearHead(rand(200, 8, seed=1), rand(200, seed=2), scale=0.3),
    "cap": LinearHead(rand(200, 8, seed=1), cap=2.0),
    "few tokens": LinearHead(rand(30, 8, seed=1)),
}
ALL = RowWeights(torch.tensor(0.7, dtype=D), 0.3, 0.2, 0.1, temperature=2.0, top_k=3)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused_module.CHUNK, "cpu", 600)  # 3 rows of 200
    monkeypatch.setitem(fused_module.BLOCK, "cpu", 400)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("teacher", ["hidden", "top 5", "top all", "none"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.usefixtures("small_chunks")
def test_terms_and_gradient_are_those_of_whole_logits(kind: str, teacher: str, temperature: float) -> None:
    head, other, labels = HEADS[kind], rand(7, 8, seed=4), torch.arange(7) * 3
    hidden = rand(7, 8, seed=3).requires_grad_()
    weights = replace(ALL, temperature=temperature, **({"consistency": 0.0} if teacher == "none" else {}))
    given: Any = None if teacher == "none" else other
    shown = logits_of(other, head)
    if teacher.startswith("top"):
        given = top_logits_of(other, head, 5 if teacher == "top 5" else 10_000, temperature)
    total, terms = fused_loss(hidden, labels, head, weights, given)
    found = torch.autograd.grad(total * 1.5, hidden)[0]

    z = logits_of(hidden, head)
    wanted = {
        "task": 0.7 * functional.cross_entropy(z, labels, reduction="sum"),
        "diversity": 0.2 * 7 * P.diversity(z, top_k=3), "confidence": 0.1 * 7 * P.confidence(z),
        "consistency": 0.3 * 7 * P.consistency(z, shown, temperature=temperature),
    }  # fmt: skip
    if teacher == "top 5":
        kept = P.top_logits(shown, 5, temperature)
        wanted["consistency"] = 0.3 * 7 * P.truncated_consistency(z, kept, temperature=temperature)
    elif teacher == "none":
        wanted["consistency"] = z.sum() * 0
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {name: value.item() for name, value in wanted.items()}, rel=1e-9, abs=1e-12
    )
    assert total.item() == pytest.approx(sum(wanted.values()).item(), rel=1e-9)
    assert not any(value.requires_grad for value in terms.values())
    torch.testing.assert_close(
        found, torch.autograd.grad(1.5 * sum(wanted.values()), hidden)[0], rtol=1e-8, atol=1e-11
    )


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
@pytest.mark.parametrize("rows", [1, 5, 100, 300, 700])
@pytest.mark.parametrize("kind", ["plain", "bias and scale", "few tokens", "wide"])
def test_singular_values_are_those_of_the_logits(kind: str, rows: int, norm: str) -> None:
    """Exact, by Gram matrix, randomized and with more rows than columns, all as the penalty on logits computes it."""
    head = HEADS.get(kind) or LinearHead(rand(600, 60, seed=5) * torch.linspace(1, 0.2, 60, dtype=D))
    hidden = rand(rows, head.weight.shape[1], seed=3).requires_grad_()
    ours = HeadSpectrum(head)(hidden, k=3, norm=norm)
    wanted = P.svd_concentration(logits_of(hidden, head), k=3, norm=norm)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-6)
    slopes = [torch.autograd.grad(value, hidden)[0] for value in (ours, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-8)


def test_singular_values_in_single_precision() -> None:
    head = LinearHead(rand(4000, 64, seed=5).float())
    hidden = (rand(500, 64, seed=3) * torch.linspace(1, 0.05, 64)).float().requires_grad_()
    ours = HeadSpectrum(head)(hidden, k=10, norm="frobenius")
    wanted = P.svd_concentration(hidden @ head.weight.mT, k=10, norm="frobenius")
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-5)
    slopes = [torch.autograd.grad(value, hidden)[0] for value in (ours, wanted)]
    assert (slopes[0] - slopes[1]).norm() < 1e-3 * slopes[1].norm()


def test_degenerate_rows_are_finite() -> None:
    head = LinearHead(rand(200, 8, seed=1).float())
    weights = replace(ALL, task=torch.tensor(1.0))
    for hidden in (torch.zeros(0, 8), torch.zeros(3, 8), rand(1, 8).float(), torch.full((4, 8), 1e3)):
        leaf = hidden.requires_grad_()
        total, terms = fused_loss(leaf, torch.zeros(len(leaf), dtype=torch.long), head, weights, leaf.detach() / 2)
        (total + HeadSpectrum(head)(leaf, k=3, norm="frobenius")).backward()
        assert total.isfinite() and leaf.grad.isfinite().all()
        assert len(leaf) or (total == 0 and not any(terms.values()))


@pytest.mark.parametrize("width", [10, 64, 1000, 1001, 4096])
def test_the_largest_are_those_of_topk(width: int) -> None:
    z = rand(6, width)
    values, columns = largest(z, 5)
    assert torch.equal(values, z.topk(5).values) and torch.equal(z.gather(1, columns), values)


def test_shapes_are_refused_in_words() -> None:
    head, hidden = HEADS["plain"], rand(4, 8)
    for arguments, text in (
        ((hidden, torch.zeros(3, dtype=torch.long), head, ALL, hidden), r"labels \(3,\).*expected \(M, 8\)"),
        ((hidden, torch.zeros(4, dtype=torch.long), head, ALL, hidden[:2]), "2 rows of the teacher"),
        ((hidden, torch.zeros(4, dtype=torch.long), head, ALL), "compares with a teacher"),
    ):
        with pytest.raises(ValueError, match=text):
            fused_loss(*arguments)
