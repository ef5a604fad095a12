"""Tokens gathered instead of masked: the same outputs and gradients as with the mask, and only where it may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, GPT2Config, ModernBertConfig

from hf_reg import patch_model
from hf_reg.seams import gathered


CONFIG = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.1, max_position_embeddings=512,
)  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {},
    {"rate": 0.95},
    {"rate": 0.5, "hide": "siblings"},
    {"rate": 0.5, "hide": "none"},
    {"rate": 0.9, "mode": "self"},
    {"rate": 0.9, "mode": "siblings"},
    {"rate": 0.5, "coin": "example"},
    {"rate": 0.5, "spare_token_ids": tuple(range(25))},
]


def train(
    config: Any, shortest: int, monkeypatch: pytest.MonkeyPatch, batch: int = 5, length: int = 24, **settings: Any
):
    """Outputs, gradients, and how often tokens were gathered."""
    calls = []
    attend = gathered.attend
    monkeypatch.setattr(gathered, "SHORTEST", shortest)
    monkeypatch.setattr(gathered, "attend", lambda *args: calls.append(1) or attend(*args))
    torch.manual_seed(0)
    model = patch_model(AutoModel.from_config(config).double().train(), "tlm", **settings)
    output = model(input_ids=torch.randint(0, 50, (batch, length))).last_hidden_state
    output.sin().sum().backward()
    monkeypatch.undo()
    return output, [parameter.grad for parameter in model.parameters() if parameter.grad is not None], len(calls)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equal_to_the_mask(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    output, gradients, calls = train(CONFIG, 1, monkeypatch, **settings)
    expected, expected_gradients, none = train(CONFIG, 10**6, monkeypatch, **settings)
    assert (calls, none) == (2, 0)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_one_token_and_every_token_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    for length, settings in ((1, {"rate": 0.9, "mode": "siblings"}), (2, {"rate": 0.999})):
        output, gradients, _ = train(CONFIG, 1, monkeypatch, length=length, **settings)
        expected, expected_gradients, _ = train(CONFIG, 10**6, monkeypatch, length=length, **settings)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(gradients, expected_gradients)


def test_long_batches_are_gathered_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(CONFIG, gathered.SHORTEST, monkeypatch, batch=1, length=512)[2] == 2
    assert train(CONFIG, gathered.SHORTEST, monkeypatch, batch=1, length=511)[2] == 0


def test_causal_and_windowed_attention_is_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert train(causal, 1, monkeypatch)[2] == 0
    windows = ModernBertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        local_attention=4, global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    assert train(windows, 1, monkeypatch)[2] == 1  # the global layer alone


def test_padding_dropout_and_drophead_keep_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "SHORTEST", 1)
    monkeypatch.setattr(gathered, "attend", lambda *args: pytest.fail("gathered"))
    ids = torch.randint(0, 50, (2, 8))
    model = patch_model(AutoModel.from_config(CONFIG).train(), "tlm")
    padding = torch.ones_like(ids)
    padding[0, 5:] = 0
    model(input_ids=ids, attention_mask=padding)
    patch_model(model, "tlm", replace_dropout=False)
    model(input_ids=ids)
    patch_model(model, "tlm")
    patch_model(model, "drophead", granularity="batch", skip=True)
    model(input_ids=ids)
