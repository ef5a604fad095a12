"""Tiny models of several families, with weights large enough that an adapter shows."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from hf_reg import BALoraConfig, SorsaConfig, get_regularized_peft_model


VOCABULARY = 60
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # class, task type, configuration
    "llama": ("LlamaForCausalLM", "CAUSAL_LM", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48}),
    "gpt2": ("GPT2LMHeadModel", "CAUSAL_LM", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": 0, "eos_token_id": 0}),
    "bert": ("BertForSequenceClassification", "SEQ_CLS", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}),
    "t5": ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM", {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "decoder_start_token_id": 0}),
}  # fmt: skip
METHODS = {"sorsa": SorsaConfig, "ba_lora": BALoraConfig}


def build(family: str = "llama") -> nn.Module:
    name, _, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name).config_class(vocab_size=VOCABULARY, **settings)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def config_of(method: str, family: str = "llama", **settings: Any) -> Any:
    return METHODS[method](**{"r": 4, "task_type": FAMILIES[family][1]} | settings)


def adapted(method: str = "sorsa", family: str = "llama", **settings: Any) -> Any:
    return get_regularized_peft_model(build(family), config_of(method, family, **settings))


def inputs(family: str = "llama", seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (3, 7), generator=generator)
    labels = torch.arange(3) if family == "bert" else ids
    return {"input_ids": ids, "labels": labels}


def logits(model: nn.Module, family: str = "llama") -> torch.Tensor:
    training = model.training
    with torch.no_grad():
        found = model.eval()(**inputs(family)).logits
    model.train(training)
    return found


def train(model: nn.Module, family: str = "llama", steps: int = 4, rate: float = 1e-2) -> nn.Module:
    """A few steps of AdamW on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        model(**inputs(family)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
