"""Prompts computed once for both answers: the same log-probs and gradients, or off by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_reg import messages as said_by
from hf_reg import patch_model, unpatch_model
from hf_reg.preferences.layouts import padded, together
from hf_reg.preferences.scoring import AnswerScores, Limits
from hf_reg.seams.segments import Segment, attend, segments_of, table

from .models import gradients, llama, lora, one_batch, trainer
from .words import PLAIN, WORDS


SMALL = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 64}),
    "qwen3": ("Qwen3", LLAMA),
    "gemma2": ("Gemma2", LLAMA | {"sliding_window": 64, "query_pre_attn_scalar": 8}),
    "gpt_bigcode": ("GPTBigCode", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoX", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                             "num_attention_heads": 4}),
    "opt": ("OPT", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "word_embed_proj_dim": 32}),
    "phi": ("Phi", LLAMA),
    "olmo2": ("Olmo2", LLAMA),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "rwkv": ("Rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
}  # fmt: skip
OFF = {"bloom", "mamba", "rwkv"}


def model(name: str, implementation: str | None = None, **settings: Any) -> nn.Module:
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**SMALL, **(sizes | settings))
    config._attn_implementation = implementation
    made = getattr(transformers, kind + "ForCausalLM")(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(said_by.logger, "warning", lambda text: "twice" in text and messages.append(text))
    return messages


def batch_of(tmp_path: Path, rows: Any = PLAIN, **settings: Any) -> dict[str, torch.Tensor]:
    return one_batch(trainer(tmp_path, rows=rows, **settings))


def sums_and_gradients(scores: AnswerScores, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    scores.model.zero_grad()
    sums, _ = scores(batch)
    (sums * torch.linspace(-1, 1, len(sums))).sum().backward()
    return sums.detach(), gradients(scores.model)


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in OFF])
def test_log_probs_and_gradients_are_those_of_padded_rows(
    name: str, implementation: str, tmp_path: Path, said: list[str]
) -> None:
    made, batch = model(name, implementation).eval(), batch_of(tmp_path)
    shared, alone = AnswerScores(made), AnswerScores(made, Limits(sharing="here"))
    found, expected = sums_and_gradients(shared, batch), sums_and_gradients(alone, batch)
    assert shared.sharing.works and not alone.sharing.works
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for key, value in expected[1].items():
        assert (found[1][key] - value).norm() <= 2e-5 * value.norm() + 1e-5, key
    (message,) = said
    assert message.endswith("answer: here.")


@pytest.mark.parametrize("name", sorted(OFF))
def test_other_models_keep_padded_rows_and_say_why(name: str, tmp_path: Path, said: list[str]) -> None:
    scores, batch = AnswerScores(model(name)), batch_of(tmp_path)
    scores(batch)
    assert not scores.sharing.works and len(said) == 1
    assert said[0].startswith(f"{MODELS[name][0]}ForCausalLM computes each prompt twice, for the chosen and the")
    assert "its forward fails" in said[0] or "not every layer is masked attention" in said[0]
    torch.testing.assert_close(scores(batch)[0], AnswerScores(scores.model, Limits(sharing="here"))(batch)[0])


def test_an_attention_window_that_is_too_short(tmp_path: Path, said: list[str]) -> None:
    batch = batch_of(tmp_path)
    scores = AnswerScores(model("mistral", "sdpa", sliding_window=24))
    found = scores(batch)[0]
    assert said == ["MistralForCausalLM computes each prompt twice, for the chosen and the rejected answer: "
                    f"{batch['input_ids'].shape[1]} tokens are longer than its attention window of 24."]  # fmt: skip
    torch.testing.assert_close(found, AnswerScores(scores.model, Limits(sharing="here"))(batch)[0])
    short = batch_of(tmp_path, [PLAIN[1]])
    assert scores.sharing(short).inputs["input_ids"].shape[0] == 1 and len(said) == 2


def test_patches_see_an_example_a_row(tmp_path: Path, said: list[str]) -> None:
    made, batch = llama().train(), batch_of(tmp_path)
    scores = AnswerScores(made)
    scores.prepare(batch)
    patch_model(made, "drophead", p=0.3)
    assert scores.sharing(batch).inputs.keys() == padded(batch).inputs.keys()
    assert said[-1].endswith("answer: patches act on a row as one example.")
    made.eval()
    assert len(scores.sharing(batch).inputs["input_ids"]) == 1
    layout = scores.sharing(batch)
    made.train()
    with pytest.raises(ValueError, match="Patches act on whole rows"):
        made(**layout.inputs)
    unpatch_model(made)
    assert len(scores.sharing(batch).inputs["input_ids"]) == 1


def test_no_token_is_computed_twice(tmp_path: Path) -> None:
    batch = batch_of(tmp_path)
    attended = int(batch["attention_mask"].sum())
    prompts = (batch["attention_mask"].sum(1) - batch["completion_mask"].sum(1))[: len(PLAIN)].sum()
    assert together(batch, in_segments=True).inputs["input_ids"].shape == (1, attended - prompts)
    layout = together(batch)
    assert layout.inputs["input_ids"].shape[0] == len(PLAIN)
    assert layout.inputs["attention_mask"].any(-1).all()  # no row without anything to attend to
    made = trainer(tmp_path, lora(moved=0.1))
    shapes: list[Any] = []
    made.model.get_base_model().model.layers[0].register_forward_hook(lambda *all: shapes.append(all[1][0].shape))
    made.train()
    assert shapes and all(shape[0] == 1 for shape in shapes[-2:])  # reference and policy


def test_prompts_that_differ_once_cut_are_not_shared(tmp_path: Path) -> None:
    rows = [{"prompt": "a prompt of some length", "chosen": " a", "rejected": " and a longer answer"}]
    batch = batch_of(tmp_path, rows, max_length=30, truncation_mode="keep_end")
    layout = together(batch, in_segments=True)
    assert layout.inputs["input_ids"].shape == (1, int(batch["attention_mask"].sum()))
    made = llama()
    torch.testing.assert_close(AnswerScores(made)(batch)[0], AnswerScores(made, Limits(sharing="here"))(batch)[0])


def test_other_prompts_of_another_collator_are_not_shared(tmp_path: Path) -> None:
    batch, made = batch_of(tmp_path, PLAIN[:2]), llama()
    batch["input_ids"][2, 3] = 9
    torch.testing.assert_close(AnswerScores(made)(batch)[0], AnswerScores(made, Limits(sharing="here"))(batch)[0])


def test_without_any_prompt(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}, *({**PLAIN[0]},)]
    batch = batch_of(tmp_path, rows)
    made = llama()
    torch.testing.assert_close(AnswerScores(made)(batch)[0], AnswerScores(made, Limits(sharing="here"))(batch)[0])


def test_rows_filled_up_on_the_left_stay_as_they_are(tmp_path: Path, said: list[str]) -> None:
    made, batch = llama(), batch_of(tmp_path)
    scores = AnswerScores(made)
    scores.prepare(batch)
    turned = {name: tensor.flip(1) if tensor.dim() == 2 else tensor for name, tensor in batch.items()}
    assert scores.sharing(turned).inputs.keys() == padded(turned).inputs.keys()
    assert said[-1].endswith("the rows of a batch are not filled up on the right.")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    made, batch = llama().train(), batch_of(tmp_path)
    scores = AnswerScores(made)
    expected = sums_and_gradients(scores, batch)
    made.gradient_checkpointing_enable({"use_reentrant": reentrant})
    made.enable_input_require_grads()
    found = sums_and_gradients(scores, batch)
    assert scores.sharing.works
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value)


def test_switched_off(tmp_path: Path, said: list[str]) -> None:
    made = trainer(tmp_path, share_prompts=False)
    made.train()
    assert not made._scores.sharing.works
    assert [message for message in said if message.endswith("rejected answer: share_prompts=False.")]


def test_models_that_leave_the_interface_are_not_confused(tmp_path: Path) -> None:
    """A table that reaches another attention function is an error, not a mask."""
    made, layout = llama(), together(batch_of(tmp_path), in_segments=True)
    made.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="with sdpa only"):
        made(**layout.inputs)


def test_attention_by_segments() -> None:
    torch.manual_seed(0)
    segments = [Segment(5), Segment(3, (1, 4)), Segment(2), Segment(4, (8, 10))]
    query, key, value = (torch.randn(1, 2, 14, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    seen, place = torch.zeros(14, 14, dtype=torch.bool), 0
    for length, (first, last) in segments:
        seen[place : place + length, place : place + length] = torch.ones(length, length).tril().bool()
        seen[place : place + length, first:last] = True
        place += length
    mask = table(segments)
    assert segments_of(mask) == segments_of(mask.clone()) == segments
    assert [segments_of(other) for other in (seen[None, None], mask + 1, mask[..., :2], None)] == [None] * 4
    found, _ = attend(sdpa_attention_forward, segments, nn.Module(), query, key, value, {})
    expected, _ = sdpa_attention_forward(nn.Module(), query, key, value, seen[None, None])
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (query, key, value)),
        torch.autograd.grad((expected * weights).sum(), (query, key, value)), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_wrong_tables_are_refused() -> None:
    states = [torch.randn(1, 2, 7, 8) for _ in range(3)]
    with pytest.raises(ValueError, match="5 tokens in segments; found queries"):
        attend(sdpa_attention_forward, [Segment(5)], nn.Module(), *states, {})
    with pytest.raises(ValueError, match="A context from 1 to 4 is not within one segment"):
        attend(sdpa_attention_forward, [Segment(2), Segment(3), Segment(2, (1, 4))], nn.Module(), *states, {})
