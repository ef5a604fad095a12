"""A tokenizer made here, with a chat template, and pairs of answers."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = 64
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]


def tokenizer(template: str | None = TEMPLATE, **tokens: Any) -> PreTrainedTokenizerFast:
    """Characters as tokens; a BOS before everything that no template renders."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz .?!Ġ"])}
    own = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="!"))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    settings = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", **tokens}
    made = PreTrainedTokenizerFast(
        tokenizer_object=own, **{key: value for key, value in settings.items() if value is not None}
    )
    made.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    made.chat_template = template
    return made


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PLAIN = [
    {"prompt": "what is the sky?", "chosen": " it is blue.", "rejected": " it is a wall of stone"},
    {"prompt": "count", "chosen": " one two three", "rejected": " one"},
    {"prompt": "end yourself ", "chosen": "yes<eos>", "rejected": "no"},
    {"prompt": "what is the sky?", "chosen": " high", "rejected": " it is low. "},
    {"prompt": "a much longer prompt than that of the others", "chosen": " short", "rejected": " shorter"},
    {"prompt": "go", "chosen": " on and on and on and on", "rejected": " off"},
    {"prompt": "left", "chosen": " or right", "rejected": " wing"},
    {"prompt": "sum", "chosen": " of all", "rejected": " of none at all"},
]
TURNS = [
    {
        "prompt": [said("system", "be kind"), said("user", row["prompt"])],
        "chosen": [said("assistant", row["chosen"])],
        "rejected": [said("assistant", row["rejected"])],
    }
    for row in PLAIN[3:]
]
IMPLICIT_TURNS = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in TURNS
]
IMPLICIT_PLAIN = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PLAIN
]
