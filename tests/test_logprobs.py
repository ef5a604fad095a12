"""Log-probs a chunk at a time: values and gradients of log_softmax over whole logits, which are never held."""

from __future__ import annotations

import pytest
import torch

from hf_reg.losses import LinearHead, fused, token_log_probs

from .benchmarks.timing import peak_memory


ROWS, DEPTH, WORDS = 23, 6, 41


def naive(hidden: torch.Tensor, tokens: torch.Tensor, head: LinearHead) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(tokens)), tokens]


def draw(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, DEPTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(WORDS, DEPTH, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(WORDS, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, torch.randint(0, WORDS, (ROWS,), generator=generator)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused.CHUNK, "cpu", 5 * WORDS)  # five rows, the last chunk shorter


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients(biased: bool, scale: float, cap: float | None, trained: bool) -> None:
    def run(function: object) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden, weight, bias, tokens = draw()
        leaves = [hidden, *([weight, bias][: 1 + biased] if trained else [])]
        for leaf in leaves:
            leaf.requires_grad_()
        values = function(hidden, tokens, LinearHead(weight, bias if biased else None, scale, cap))  # type: ignore
        (values * torch.linspace(-1, 2, ROWS, dtype=torch.float64)).sum().backward()
        return values, [leaf.grad for leaf in leaves]  # type: ignore[misc]

    found, gradients = run(token_log_probs)
    wanted, expected = run(naive)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients, expected)


def test_half_precision_is_computed_in_fp32() -> None:
    hidden, weight, _, tokens = draw(torch.bfloat16)
    hidden.requires_grad_()
    found = token_log_probs(hidden, tokens, LinearHead(weight))
    assert found.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden.detach(), weight).float()  # rounded as the model rounds them
    torch.testing.assert_close(found, torch.log_softmax(logits, -1)[torch.arange(ROWS), tokens])
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_without_gradients_and_without_rows() -> None:
    hidden, weight, _, tokens = draw()
    with torch.no_grad():
        assert not token_log_probs(hidden, tokens, LinearHead(weight)).requires_grad
    none = token_log_probs(hidden[:0].requires_grad_(), tokens[:0], LinearHead(weight))
    assert none.shape == (0,)
    none.sum().backward()


@pytest.mark.parametrize("trained", [False, True])
def test_whole_logits_are_never_held(trained: bool) -> None:
    rows, words = 512, 4096
    hidden, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(words, 16, requires_grad=trained)
    tokens = torch.randint(0, words, (rows,))
    peak = peak_memory(lambda: token_log_probs(hidden, tokens, LinearHead(weight)).sum().backward())
    assert peak < rows * words * 4 / 4


def test_bad_input_is_named() -> None:
    hidden, weight, _, tokens = draw()
    with pytest.raises(ValueError, match=r"hidden \(23, 5\), tokens \(23,\); expected \(M, 6\) and \(M,\)"):
        token_log_probs(hidden[:, :5], tokens, LinearHead(weight))
    tokens[3] = -100
    with pytest.raises(ValueError, match=r"tokens from -100 to \d+; expected 0 to 40. Leave out positions without"):
        token_log_probs(hidden, tokens, LinearHead(weight))
