"""Every causal language model of the installed transformers: prompts are shared exactly, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from hf_reg import messages
from hf_reg.preferences import PreferenceCollator
from hf_reg.preferences.scoring import AnswerScores, Limits

from ..architectures.configs import tiny_config


CONFIGURATION = "its tiny configuration is that of a larger model, or not valid"
UNTRIED = {  # of transformers 5.23; any other type that cannot be tried is a failure
    **dict.fromkeys(
        ("dots3_note", "emu3", "gemma4_assistant", "gemma4_unified_assistant", "llama4", "musicgen",
         "musicgen_melody", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
        CONFIGURATION,
    ),
    "gemma3n": "it needs timm",
    "git": "it puts image tokens before the text, and compares other lengths",
    "reformer": "it takes rows of one length only",
}  # fmt: skip
LENGTHS = ((6, 3, 5), (4, 4, 2), (7, 1, 6))


def build(model_type: str) -> Any:
    config = tiny_config(model_type)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    names = CLASSES[model_type]
    model = getattr(transformers, names if isinstance(names, str) else names[0])(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(CLASSES))
def test_log_probs_are_those_of_padded_rows(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(messages.logger, "warning", said.append)
    generator = torch.Generator().manual_seed(0)
    if model_type in UNTRIED:
        pytest.skip(UNTRIED[model_type])
    model = build(model_type)
    words = min(model.config.get_text_config().vocab_size, 50)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: torch.randint(3, words, (n,), generator=generator).tolist() for name, n in zip(names, row, strict=True)}
        for row in LENGTHS
    ]
    batch = PreferenceCollator(0)(rows)
    expected = AnswerScores(model, Limits(sharing="here"))(batch)[0]
    said.clear()
    scores = AnswerScores(model)
    found = scores(batch)[0]
    assert scores.sharing.works or any("computes each prompt twice" in message for message in said)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
