"""Tokenizers and models of a recipe, with its adapter."""

from __future__ import annotations

from typing import Any

from .errors import RunError, refused_as_run
from .recipe import Model


__all__ = ["check_length", "load_model", "load_tokenizer", "with_adapter"]


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
    """The model with the adapter of a PEFT configuration, or as it is where there is none."""
    if config is None:
        return model
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
