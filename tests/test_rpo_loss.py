"""RPO's loss against the formulas written out, by finite differences, and at its edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_reg import rpo_loss
from hf_reg.losses import to_trl


VARIANTS = ("cumulative", "average", "trl")


def pairs(count: int = 8) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = [-30 * torch.rand(count, generator=generator, dtype=torch.float64) - 1 for _ in range(4)]
    return draw, torch.randint(1, 40, (count,), generator=generator)


def written_out(
    log_probs: list[torch.Tensor], lengths: torch.Tensor, beta: float, eta: float, variant: str, smoothing: float = 0.0
) -> float:
    """METHODS 5.1 and 5.4, a pair at a time."""
    total, likelihood = 0.0, 0.0
    rows = list(zip(*(tensor.tolist() for tensor in log_probs), lengths.tolist(), strict=True))
    for chosen, rejected, ref_chosen, ref_rejected, length in rows:
        h = (chosen - ref_chosen) - (rejected - ref_rejected)
        right, wrong = math.log1p(math.exp(-beta * h)), math.log1p(math.exp(beta * h))
        total += ((1 - smoothing) * right + smoothing * wrong) / len(rows)
        if variant == "cumulative":
            likelihood -= eta * beta * chosen / len(rows)
        elif variant == "average":
            likelihood -= eta * chosen / length / len(rows)
    if variant == "trl":
        likelihood = -eta * float(log_probs[0].sum()) / int(lengths.sum())
    return total + likelihood


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_formula(variant: str, smoothing: float) -> None:
    log_probs, lengths = pairs()
    found = rpo_loss(*log_probs, beta=0.1, eta=0.3, variant=variant, lengths=lengths, label_smoothing=smoothing)
    assert float(found.loss) == pytest.approx(written_out(log_probs, lengths, 0.1, 0.3, variant, smoothing), rel=1e-12)
    assert float(found.dpo + found.sft) == pytest.approx(float(found.loss), rel=1e-15)


def test_three_normalisations_give_three_numbers() -> None:
    lengths = torch.tensor([40, 100, 400])
    chosen = -lengths * torch.tensor([1.2, 1.0, 0.8])
    zeros = torch.zeros(3)
    found = {
        v: float(rpo_loss(chosen, zeros, chosen, zeros, beta=0.01, eta=0.005, variant=v, lengths=lengths).sft)
        for v in VARIANTS
    }
    assert found == pytest.approx({"cumulative": 0.0078, "average": 0.005, "trl": 0.00433333}, rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_defaults_are_the_published_ones(variant: str) -> None:
    log_probs, lengths = pairs()
    beta, eta = {"cumulative": (0.01, 0.005), "average": (0.5, 0.2), "trl": (0.01, 0.005)}[variant]
    given = rpo_loss(*log_probs, beta=beta, eta=eta, variant=variant, lengths=lengths)
    assert torch.equal(rpo_loss(*log_probs, variant=variant, lengths=lengths).loss, given.loss)


def test_without_eta_it_is_dpo_bit_for_bit() -> None:
    log_probs, _ = pairs()
    chosen, rejected, ref_chosen, ref_rejected = (tensor.float() for tensor in log_probs)
    logits = (chosen - ref_chosen) - (rejected - ref_rejected)
    dpo = -torch.nn.functional.logsigmoid(0.1 * logits).mean()
    for variant in VARIANTS:  # and no lengths are asked for
        found = rpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, eta=0, variant=variant)
        assert torch.equal(found.loss, dpo) and found.sft == 0


def test_at_the_reference_it_is_log_2_and_the_likelihood() -> None:
    log_probs, _ = pairs()
    found = rpo_loss(log_probs[0], log_probs[1], log_probs[0], log_probs[1])
    assert float(found.dpo) == pytest.approx(math.log(2), rel=1e-12)
    assert found.sft.item() == pytest.approx(-0.005 * 0.01 * float(log_probs[0].mean()), rel=1e-12)
    assert not found.accuracies.any() and not found.margins.any()


@pytest.mark.parametrize("base", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_by_finite_differences(variant: str, base: str) -> None:
    log_probs, lengths = pairs(3)
    settings: dict[str, Any] = {"beta": 0.05, "eta": 0.3, "variant": variant, "lengths": lengths, "base": base}
    policy = [tensor.clone().requires_grad_() for tensor in log_probs[:2]]
    assert torch.autograd.gradcheck(lambda c, r: rpo_loss(c, r, *log_probs[2:], **settings).loss, policy)
    rpo_loss(*policy, *log_probs[2:], **settings).loss.backward()
    if base == "sigmoid":
        assert (policy[0].grad < 0).all() and (policy[1].grad > 0).all()  # type: ignore[operator]


@pytest.mark.parametrize("variant", ["cumulative", "average"])
def test_one_by_eight_is_eight_by_one(variant: str) -> None:
    log_probs, lengths = pairs()
    whole = rpo_loss(*log_probs, beta=0.1, eta=0.3, variant=variant, lengths=lengths).loss
    parts = [
        rpo_loss(*(t[i : i + 1] for t in log_probs), beta=0.1, eta=0.3, variant=variant, lengths=lengths[i : i + 1])
        for i in range(8)
    ]
    torch.testing.assert_close(torch.stack([part.loss for part in parts]).mean(), whole)


def test_the_other_bases() -> None:
    log_probs, _ = pairs()
    h = (log_probs[0] - log_probs[2]) - (log_probs[1] - log_probs[3])
    hinge = rpo_loss(*log_probs, beta=0.1, eta=0, base="hinge").loss
    torch.testing.assert_close(hinge, torch.relu(1 - 0.1 * h).mean())
    torch.testing.assert_close(rpo_loss(*log_probs, beta=0.1, eta=0, base="ipo").loss, (h - 5).square().mean())


def test_empty_answers_are_counted_and_finite() -> None:
    chosen = torch.tensor([0.0, -4.0], requires_grad=True)
    zeros = torch.zeros(2)
    for variant, wanted in (("average", 0.5), ("trl", 1.0)):
        found = rpo_loss(chosen, zeros, zeros, zeros, beta=0.1, eta=1.0, variant=variant, lengths=torch.tensor([0, 4]))
        assert found.sft.item() == pytest.approx(wanted)
    none = rpo_loss(chosen * 0, zeros, zeros, zeros, variant="trl", lengths=torch.tensor([0, 0]))
    none.loss.backward()
    assert none.sft == 0 and chosen.grad is not None and chosen.grad.isfinite().all()


def test_rewards_are_those_that_trl_logs() -> None:
    log_probs, _ = pairs()
    found = rpo_loss(*log_probs, beta=0.1, eta=0)
    torch.testing.assert_close(found.rewards_chosen, 0.1 * (log_probs[0] - log_probs[2]))
    torch.testing.assert_close(found.margins, found.rewards_chosen - 0.1 * (log_probs[1] - log_probs[3]))
    assert torch.equal(found.accuracies, (found.margins > 0).double())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"beta": 0.0}, "beta=0.0 is out of range"),
        ({"eta": -1.0}, "eta=-1.0 is out of range"),
        ({"eta": float("nan")}, "eta=nan is out of range"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 is out of range"),
        ({"label_smoothing": 0.1, "base": "ipo"}, "no meaning with base='ipo'"),
        ({"variant": "averaged"}, "variant.*average"),
        ({"base": "dpo"}, "base.*sigmoid"),
        ({"variant": "average"}, "divides by the number of chosen tokens; lengths: none, expected"),
        ({"variant": "trl", "lengths": torch.ones(3)}, r"lengths: \(3,\), expected \(8,\)"),
        ({"rpo_alpha": 1.0}, "0.10 to 0.28 .*eta=alpha"),
    ],
    ids=str,
)
def test_bad_input_is_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rpo_loss(*pairs()[0], **settings)


def test_bad_shapes_are_named() -> None:
    log_probs, _ = pairs()
    with pytest.raises(ValueError, match=r"ref_rejected \(7,\): expected \(B,\) each"):
        rpo_loss(*log_probs[:3], log_probs[3][:7])
    with pytest.raises(ValueError, match="no pair in the batch"):
        rpo_loss(*(tensor[:0] for tensor in log_probs))


def test_translation_to_trl() -> None:
    assert to_trl(variant="trl", beta=0.1, eta=0.3) == {
        "beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3],
    }  # fmt: skip
    assert to_trl(mean_length=300)["loss_weights"][1] == pytest.approx(0.015)
    assert to_trl(eta=0) == {"beta": 0.01, "loss_type": ["sigmoid"]}
    with pytest.raises(ValueError, match="give mean_length"):
        to_trl()
