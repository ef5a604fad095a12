"""Every other patch at its default against the unpatched model; what moves the model's own dropout also against that
model with the same dropout, and what acts on adapters against the model with the adapter."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from hf_reg import patch_model, set_dropout
from hf_reg.patching import known_patches

from .steps import minilm, step
from .timing import Row, interleave, memory_rows, ratio


ELSEWHERE = {"tlm", "drophead", "head_mask", "weight_compander", "factorized"}
MOST, CASE = 1.03, "MiniLM step, 16 x 128"
STOCK = {  # the model's own dropout at the same rate
    "attention_dropout": ("own attention dropout", {"attention": 0.1}),
    "hidden_dropout": ("own hidden dropout", {"hidden": 0.1}),
    "dynamic_dropout": ("own dropout", {"attention": 0.1, "hidden": 0.1}),
}


def lora() -> torch.nn.Module:
    return get_peft_model(minilm(), LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS")).train()


def patched(name: str) -> torch.nn.Module:
    if name == "tensor_dropout":
        return patch_model(lora(), name)
    return patch_model(minilm(), name, **({"p": 0.1} if name == "dynamic_dropout" else {}))


def stock(rates: dict[str, float]) -> torch.nn.Module:
    model = minilm()
    set_dropout(model, **rates)
    return model


def run(rounds: int) -> list[Row]:
    names = [name for name in known_patches() if name not in ELSEWHERE]
    variants = {"unpatched": minilm(), "LoRA": lora()} | {name: patched(name) for name in names}
    variants |= {peer: stock(rates) for peer, rates in STOCK.values()}
    rows = []
    steps = {name: step(model, 16, 128) for name, model in variants.items()}
    times = interleave(steps, rounds, f"patches, {CASE}")
    for name in names:
        own = STOCK.get(name, ("LoRA" if name == "tensor_dropout" else "unpatched",))[0]
        for peer in dict.fromkeys((own, "unpatched") if name in STOCK else (own,)):
            middle, spread = ratio(times, name, peer)
            rows.append(Row("patches", CASE, name, peer, middle, MOST if peer == own else None, spread=spread))
    alike = {name: steps[name] for name in ("unpatched", *names) if name not in STOCK and name != "tensor_dropout"}
    return rows + memory_rows("patches", CASE, alike, tuple(name for name in alike if name != "unpatched"))
