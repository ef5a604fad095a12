"""Tokenizers and models of a recipe, with its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from .errors import RunError, refused_as_run
from .recipe import Model


__all__ = [
    "check_length", "class_config", "load_fast_tokenizer", "load_model", "load_tokenizer", "with_adapter",
    "word_prefix",
]  # fmt: skip

HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}  # of peft's task types


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer; one without a padding token pads with the token that ends texts, which masks hide."""
    from transformers import AutoTokenizer

    with refused_as_run(f"the tokenizer of {model.name} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model.place, revision=model.revision or "main")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RunError(
                f"the tokenizer of {model.name} has neither pad_token nor eos_token. Save one with a pad_token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_fast_tokenizer(model: Model) -> Any:
    """The same, if it says of its pieces where in the text they are; else a [`RunError`]."""
    tokenizer = load_tokenizer(model)
    if not tokenizer.is_fast:
        raise RunError(
            f"the tokenizer of {model.name} does not say where its pieces are. Give a model with a fast one."
        )
    return tokenizer


def word_prefix(tokenizer: Any) -> str:
    """What each word of a text that is split into words needs before it: a space, where the tokenizer's pieces begin
    with one within a text (as those of GPT-2 do), but not in words by themselves."""
    within = tokenizer.tokenize("a a")
    apart = tokenizer.convert_ids_to_tokens(tokenizer(["a", "a"], is_split_into_words=True)["input_ids"])
    marked = [any(piece.startswith("Ġ") for piece in pieces) for pieces in (within, apart)]
    return " " if marked == [True, False] else ""


def load_model(auto: Any, model: Model, whole: bool, **settings: Any) -> Any:
    """A model of the class `auto`; `whole`: whether its own weights are trained, see [`Model`]."""
    given: dict[str, Any] = {
        "dtype": model.dtype or ("float32" if whole else "auto"),
        "revision": model.revision or "main",
    }
    if model.attn_implementation is not None:
        given["attn_implementation"] = model.attn_implementation
    with refused_as_run(f"model {model.name} cannot be loaded"):
        return auto.from_pretrained(model.place, **{**given, **settings})


def with_adapter(model: Any, config: Any) -> Any:
    """The model with the adapter of a PEFT configuration, or as it is where there is none.

    A head that PEFT trains whole is left out of "all-linear", where it would be a second time. (PEFT does so by itself
    for sequence classification.)
    """
    if config is None:
        return model
    if config.target_modules == "all-linear" and config.exclude_modules is None and config.task_type in HEADS:
        config = copy(config)
        config.exclude_modules = list(HEADS[config.task_type])
    from peft import get_peft_model

    from ..adapters import get_regularized_peft_model
    from ..adapters.config import SvdAdapterConfig

    add = get_regularized_peft_model if isinstance(config, SvdAdapterConfig) else get_peft_model
    with refused_as_run("the adapter cannot be added"):
        return add(model, config)


def check_length(max_tokens: int, tokenizer: Any, model: Any) -> None:
    """Raise [`RunError`] if texts of `max_tokens` are longer than the model takes."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = min(limit for limit in (tokenizer.model_max_length, positions or max_tokens) if limit)
    if max_tokens > most:
        raise RunError(f"data.max_tokens: {max_tokens} tokens are more than the model takes. Give {most} or fewer.")


def class_config(model: Model, labels: Sequence[Any], names: Sequence[str] | None) -> tuple[Any, dict[Any, int]]:
    """The model's configuration with these classes, and the id of each label; a model that knows classes of these
    names keeps its ids, since its head was trained with them."""
    from transformers import AutoConfig

    with refused_as_run(f"model {model.name} cannot be loaded"):
        config = AutoConfig.from_pretrained(model.place, revision=model.revision or "main")
    said = names or [str(label) for label in labels]
    known = dict(config.label2id or {})
    order = {name: known[name] for name in said} if set(known) == set(said) else {n: i for i, n in enumerate(said)}
    config.id2label = {index: name for name, index in sorted(order.items(), key=lambda item: item[1])}
    config.label2id, config.problem_type = order, "single_label_classification"
    return config, {label: order[name] for label, name in zip(labels, said, strict=True)}
