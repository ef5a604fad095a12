"""Tiny policies and trainers."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_reg import RPOConfig, RPOTrainer

from .words import PLAIN, WORDS, tokenizer


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=WORDS, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **{**sizes, **settings},
    )  # fmt: skip
    return LlamaForCausalLM(config)


def lora(model: nn.Module | None = None, seed: int = 1, moved: float = 0.0, **settings: Any) -> Any:
    """With a LoRA adapter that is zero, or `moved` away from it."""
    base = llama() if model is None else model
    torch.manual_seed(seed)
    adapted: Any = get_peft_model(
        base, LoraConfig(**{"r": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings})
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if moved and "lora_B" in name:
                parameter.normal_(std=moved)
    return adapted


def arguments(folder: Any, **settings: Any) -> RPOConfig:
    fixed = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    fixed |= {"max_length": 64, "logging_steps": 1, "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.01}
    return RPOConfig(str(folder), **{**fixed, "per_device_train_batch_size": len(PLAIN), "optim": "sgd", **settings})


def trainer(
    folder: Any, model: Any = None, rows: Any = PLAIN, *, ref_model: Any = None, **settings: Any
) -> RPOTrainer:
    own = {name: settings.pop(name) for name in ("penalties", "patches", "eval_dataset") if name in settings}
    return RPOTrainer(
        lora() if model is None else model, arguments(folder, **settings), train_dataset=rows,
        processing_class=tokenizer(), ref_model=ref_model, **own,
    )  # fmt: skip


def one_batch(made: RPOTrainer) -> dict[str, torch.Tensor]:
    return made._prepare_inputs(made.data_collator([made.train_dataset[i] for i in range(len(made.train_dataset))]))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
