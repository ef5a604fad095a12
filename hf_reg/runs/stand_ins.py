"""What stands for models and data in a smoke run: a tiny random model, its tokenizer, and rows of a task."""

from __future__ import annotations

from collections.abc import Collection
from itertools import cycle
from pathlib import Path
from typing import Any


__all__ = ["family_of", "rows_of", "save_stand_in"]

ROWS = 24  # all choices here are ours
SPARE_POSITIONS = 8  # beyond the longest text, for what models count from an offset
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>"]
SENTENCES = ("the red ball is in the house", "one two three and then four", "a wall of stone", "the sky is high up")
TEXTS = [f"{text}, {number}" for number, text in zip(range(ROWS), cycle(SENTENCES), strict=False)]
FAMILIES = {  # of a task: what a model's name may hold, in the order that it is looked for; else the last one
    "preference": ("llama",), "causal-lm": ("llama",), "seq2seq": ("t5",),
    "sequence-classification": ("deberta", "llama", "bert"), "token-classification": ("deberta", "bert"),
    "question-answering": ("deberta", "bert"),
}  # fmt: skip


def family_of(task: str, name: str) -> str:
    """The architecture that stands for a model in a task, by its name where that says something."""
    known = FAMILIES[task]
    return next((one for one in known if one in name.lower()), known[-1])


def rows_of(task: str, optional: Collection[str]) -> list[dict[str, Any]]:
    """Rows with the columns of a task, and a second text in those `optional` ones that the recipe names."""
    second = {key: "another text" for key in ("text_pair", "prompt") if key in optional}
    if task == "preference":
        return [{"prompt": text, "chosen": " yes, that is so", "rejected": " no"} for text in TEXTS]
    if task == "causal-lm":
        return [{"text": text, **second} for text in TEXTS]
    if task == "sequence-classification":
        return [{"text": text, **second, "label": ("even", "odd")[n % 2]} for n, text in enumerate(TEXTS)]
    if task == "token-classification":
        words = [text.split() for text in TEXTS]
        return [{"tokens": own, "tags": ["long" if len(word) > 3 else "short" for word in own]} for own in words]
    if task == "question-answering":
        second_words = [(text, text.split()[1]) for text in TEXTS]
        answers = [(text, {"text": [word], "answer_start": [text.index(word)]}) for text, word in second_words]
        return [{"context": text, "question": "what is second", "answers": own} for text, own in answers]
    return [{"source": text, "target": text[:10]} for text in TEXTS]


def _tokenizer() -> Any:
    """Bytes as tokens, between a beginning and an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        "<bos> $A", "<bos> $A <eos> $B:1", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    names = {f"{token[1:-1]}_token": token for token in SPECIAL}
    own = PreTrainedTokenizerFast(tokenizer_object=made, cls_token="<bos>", sep_token="<eos>", **names)
    own.chat_template = "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }}<eos>{% endfor %}"
    return own


def _model(family: str, width: int, longest: int, words: int) -> Any:
    import transformers as hf

    ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": words}
    if family == "t5":
        sizes = {"d_model": width, "d_kv": width // 4, "d_ff": 2 * width, "num_layers": 2, "num_heads": 4}
        return hf.T5ForConditionalGeneration(hf.T5Config(decoder_start_token_id=0, **sizes, **ends))
    config, model = {
        "deberta": (hf.DebertaV2Config, hf.DebertaV2Model), "bert": (hf.BertConfig, hf.BertModel),
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
    }[family]  # fmt: skip
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "deberta":  # as version 3 is
        ends |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
                 "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 256}  # fmt: skip
    return model(config(max_position_embeddings=longest, **sizes, **ends))


def save_stand_in(folder: Path, family: str, width: int, longest: int) -> None:
    """A tiny random model and its tokenizer, as `from_pretrained` reads them.

    Args:
        width (`int`): of the hidden states; a multiple of 4.
        longest (`int`): text that it takes, in tokens.
    """
    tokenizer = _tokenizer()
    _model(family, width, longest + SPARE_POSITIONS, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
