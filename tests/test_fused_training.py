"""The loss in chunks within the trainer, against the same trainer with whole logits: every gradient, every term."""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments
from hf_reg import penalties as P

from .distributed.heads import LLAMA, Spy, difference, make, rows
from .distributed.launch import launch


TERMS: dict[str, Callable[[], list[Any]]] = {
    "iclr2026": lambda: [
        P.Consistency(weight=0.5), P.Diversity(weight=0.2, top_k=5), P.SvdConcentration(weight=0.3, k=3)
    ],
    "v5": lambda: P.ba_lora(version="v5", lambdas=(0.5, 0.2, 0.3)),
    "confidence": lambda: [P.Confidence(weight=0.2), P.L2(weight=0.01)],
}  # fmt: skip


def made_trainer(
    penalties: Any, batch: int = 4, accumulation: int = 1, head: str = "lora/llama", kind: type = RegularizedTrainer,
    steps: int = 2, model: Any = None, data: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    own = {
        key: settings.pop(key)
        for key in ("teacher", "compute_loss_func", "patches", "data_collator")
        if key in settings
    }
    args = RegularizedTrainingArguments(
        "unused", **{"max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": 0.01, "use_cpu": True,
        "optim": "sgd", "gradient_accumulation_steps": accumulation, "report_to": [], "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
        | settings,
    )  # fmt: skip
    spy = Spy()
    made = kind(
        model=make(head) if model is None else model, args=args, train_dataset=data or rows(head),
        eval_dataset=rows(head), penalties=penalties, callbacks=[spy], **own,
    )  # fmt: skip
    made.spy = spy
    return made


def run(penalties: Any, **settings: Any) -> Any:
    made = made_trainer(penalties, **settings)
    made.train()
    return made


def history(made: Any) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if key.startswith("loss")}
        for entry in made.state.log_history if "loss" in entry
    ]  # fmt: skip


def same(ours: Any, other: Any, tolerance: float = 1e-5) -> None:
    """Gradients of every step and all logged terms."""
    assert ours._fused.head is not None and other._fused.head is None
    assert len(ours.spy.steps) == len(other.spy.steps) > 0
    for found, wanted in zip(ours.spy.steps, other.spy.steps, strict=True):
        assert difference(found, wanted) < tolerance
    for found, wanted in zip(history(ours), history(other), strict=True):
        assert found == pytest.approx(wanted, rel=tolerance)


def double(**settings: Any) -> Any:
    """In single precision the divergence of two nearly equal distributions has three digits. (The task loss of
    transformers is in single precision all the same.)"""
    return run(model=make("lora/llama").double(), **settings)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", TERMS)
def test_a_run_is_that_of_whole_logits(kind: str, accumulation: int) -> None:
    ours, other = (
        double(penalties=TERMS[kind](), accumulation=accumulation, batch=4, fused_loss=fused)
        for fused in (None, False)
    )
    same(ours, other, 2e-6)
    assert len(history(ours)[0]) == (5 if kind != "confidence" else 4)


def test_in_single_precision_and_under_autocast() -> None:
    def train(**settings: Any) -> Any:
        model = make("lora/llama")
        model.get_output_embeddings().weight.data.mul_(10)  # far from its teacher
        return run(TERMS["iclr2026"](), model=model, **settings)

    exact = train(fused_loss=False)
    same(train(), exact)
    errors = [
        difference(train(bf16=True, steps=1, fused_loss=fused).spy.steps[0], exact.spy.steps[0])
        for fused in (None, False)
    ]
    assert 0 < errors[0] < 1.2 * errors[1] < 0.15


@pytest.mark.parametrize("arguments", [True, False])
def test_a_run_without_penalties(arguments: bool) -> None:
    """`True` asks for it; a model that divides its loss itself and one that is not asked to."""
    models = [make("lora/llama") for _ in range(2)]
    for model in models:
        model.accepts_loss_kwargs = model.get_base_model().accepts_loss_kwargs = arguments
    ours, other = (
        run(None, accumulation=3, batch=2, model=model, fused_loss=fused)
        for model, fused in zip(models, (True, None), strict=True)
    )
    assert ours.model_accepts_loss_kwargs is arguments
    same(ours, other)


def test_schedules_patches_and_penalties_on_parameters_beside_it() -> None:
    def everything() -> Any:
        return [
            P.Consistency(weight=0.5, schedule="linear"),
            P.Diversity(weight=0.2, schedule="two_phase"),
            P.L1(weight=0.01),
        ]

    ours, other = (double(penalties=everything(), patches="tlm", steps=4, fused_loss=fused) for fused in (None, False))
    same(ours, other)
    assert "loss_diversity" not in history(ours)[0] and "loss_diversity" in history(ours)[-1]


def padded(found: list[dict[str, torch.Tensor]], side: str) -> dict[str, torch.Tensor]:
    """A collator: each row loses two tokens more than the last, and is padded to the longest."""
    kept = [{key: row[key][: 12 - 2 * index] for key in ("input_ids", "labels")} for index, row in enumerate(found)]
    for row in kept:
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    pad = nn.utils.rnn.pad_sequence
    batch = {key: pad([row[key] for row in kept], True, value, side) for key, value in fill.items()}
    ids = {"example_ids": torch.tensor([row["example_ids"] for row in found])} if "example_ids" in found[0] else {}
    return batch | ids


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str, tmp_path: Path) -> None:
    ours, other, cached = (
        double(penalties=TERMS["iclr2026"](), data_collator=partial(padded, side=side), fused_loss=fused,
               teacher_cache=folder and str(folder), teacher_cache_top_k=64)
        for fused, folder in ((None, None), (False, None), (None, tmp_path))
    )  # fmt: skip
    same(ours, other, 2e-6)
    same(cached, other, 2e-6)


def test_gradient_checkpointing() -> None:
    ours, other = (double(penalties=TERMS["iclr2026"](), gradient_checkpointing=fused is None, fused_loss=fused)
                   for fused in (None, False))  # fmt: skip
    same(ours, other, 2e-6)


def test_settings_from_a_command_line() -> None:
    parser = hf.HfArgumentParser(RegularizedTrainingArguments)
    for text, wanted in (("", None), ("--fused_loss True", True), ("--fused_loss False", False)):
        (args,) = parser.parse_args_into_dataclasses([*text.split(), "--teacher_cache", "there"])
        assert args.fused_loss is wanted and (args.teacher_cache, args.teacher_cache_top_k) == ("there", 64)


def test_a_batch_in_which_nothing_counts() -> None:
    data = rows("lora/llama")
    for row in data[:2]:
        row["labels"] = torch.full_like(row["labels"], -100)
    made = run(TERMS["iclr2026"](), batch=2, accumulation=2, data=data, steps=1)
    assert made._fused.head is not None and all(g.isfinite().all() for g in made.spy.steps[0].values())


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}, "gemma2": {"head_dim": 16},
    "cohere": {"logit_scale": 0.25}, "granite": {"logits_scaling": 4.0}, "phi": {}, "qwen2": {}, "minicpm3": {},
    "falcon_h1": {},
}  # fmt: skip


def family(kind: str, **more: Any) -> nn.Module:
    common = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **common | FAMILIES[kind] | more))


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in ("minicpm3", "falcon_h1")])
def test_logits_of_other_families(kind: str) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    terms = TERMS["iclr2026"] if kind != "gemma2" else lambda: TERMS["iclr2026"]()[:2]
    runs = []
    for fused in (None, False):
        torch.manual_seed(1)
        model = get_peft_model(family(kind), config)
        runs.append(run(terms(), model=model.double(), fused_loss=fused))
    same(*runs)
    head = runs[0]._fused.head
    assert (head.scale, head.cap) == {"cohere": (0.25, None), "granite": (0.25, None), "gemma2": (1.0, 30.0)}.get(
        kind, (1.0, None)
    )


def test_a_cap_that_is_configured_and_not_used_is_not_used() -> None:
    model = make("lora/llama")
    model.config.final_logit_softcapping, model.config.logit_scale = 30.0, 0.5
    head = run([P.Confidence(weight=0.2)], model=model)._fused.head
    assert head is not None and (head.scale, head.cap) == (1.0, None)


class OddForCausalLM(hf.LlamaForCausalLM):
    """With logits that no configuration names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 3
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, self.config.vocab_size, num_items_in_batch=items)
        return outputs


class ExtraForCausalLM(hf.LlamaForCausalLM):
    """With one more term in its loss, as a mixture of experts has."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.5
        return outputs


def peft(model: nn.Module, **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=2, **{"target_modules": ["q_proj"], "init_lora_weights": False} | settings)
    )


def llama(kind: type = hf.LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    return kind(hf.LlamaConfig(**LLAMA))


def own_penalty(model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
    return outputs.logits.square().mean()


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


class MuteForCausalLM(hf.LlamaForCausalLM):
    """With a fused loss of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = None
        return outputs


def compiled() -> nn.Module:
    model = peft(llama())
    model.base_model.model.model.layers[0].compile(backend="eager")
    return model


def prompted() -> nn.Module:
    return get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


WHOLE = {"remove_unused_columns": False}
NOT: dict[str, tuple[dict[str, Any], str]] = {
    "trained head": ({"model": lambda: llama(), "penalties": {"confidence": 0.1}}, "head .* is trained"),
    "adapted head": (
        {"model": lambda: peft(llama(), target_modules=["q_proj", "lm_head"])}, "head .* is adapted"
    ),
    "saved head": (
        {"model": lambda: peft(llama(), modules_to_save=["lm_head"])}, "head .* is adapted"
    ),
    "odd logits": ({"model": lambda: peft(llama(OddForCausalLM))} | WHOLE, "are not a scaled or capped"),
    "extra loss": ({"model": lambda: peft(llama(ExtraForCausalLM))} | WHOLE, "returns a loss of .* where"),
    "capped": ({"model": lambda: peft(family("gemma2", head_dim=16))}, "the logits are capped"),
    "own penalty": ({"penalties": {"confidence": 0.1, "mine": own_penalty}}, "the penalty mine looks at the outputs"),
    "r-drop": ({"penalties": {"confidence": 0.1, "r_drop": 0.1}}, "the penalty r_drop looks at the outputs"),
    "no shift": ({"penalties": {"confidence": {"shift": False}}}, "the penalty confidence has shift=False"),
    "twice": (
        {"penalties": [P.Confidence(), P.Diversity(top_k=None)]}, "the penalty diversity is the second of its kind"
    ),
    "more positions": ({"model": prompted, "penalties": {"l2": 0.1}}, "adds 3 positions of its own"),
    "compiled": ({"model": compiled}, "the model is compiled"),
    "no logits": (
        {"model": lambda: peft(llama(MuteForCausalLM)), "penalties": {"l2": 0.1}} | WHOLE, "returns logits None"
    ),
    "smoothing": ({"label_smoothing_factor": 0.1}, "label smoothing looks at whole logits"),
    "function": ({"compute_loss_func": summed}, "compute_loss_func looks at whole logits"),
    "shares": ({"gradient_shares": True}, "gradient_shares needs a gradient for each term"),
    "own teacher": ({"teacher": lambda: llama()}, "the teacher is a model of its own"),
    "no language model": (
        {"head": "tokens/bert", "penalties": {"confidence": 0.1}}, "BertForMaskedLM is no causal language model"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT)
def test_what_cannot_be_fused_is_said_once_and_runs_with_whole_logits(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings, text = NOT[kind]
    settings = {
        key: value() if key in ("model", "teacher") else copy.deepcopy(value) if key == "penalties" else value
        for key, value in settings.items()
    }
    hf.logging.set_verbosity_info()
    try:
        made = run(settings.pop("penalties", None) or TERMS["iclr2026"](), fused_loss=True, steps=2, **settings)
    finally:
        hf.logging.set_verbosity(hf.logging.CRITICAL)
    said = [record for record in caplog.records if "computed from whole logits" in record.message]
    assert len(said) == 1 and said[0].levelno == logging.WARNING, [record.message for record in said]
    assert re.search(text, said[0].message), said[0].message
    assert made._fused.head is None and len(history(made)) == 2


@pytest.mark.distributed
def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    """Micro-batches of two processes are those of one with twice the accumulation."""
    launch("tests.test_fused_training", str(tmp_path))
    found = torch.load(tmp_path / "gradients.pt")
    assert len(found) == 4
    for (kind, accumulation), gradients in found.items():
        alone = run(TERMS[kind](), batch=2, accumulation=2 * accumulation, steps=1, fused_loss=False)
        assert difference(gradients, alone.spy.steps[0]) < 1e-5, (kind, accumulation)


if __name__ == "__main__":
    results = {}
    for name in ("iclr2026", "confidence"):
        for parts in (1, 2):
            made = run(TERMS[name](), batch=2, accumulation=parts, steps=1)
            assert made.args.world_size == 2 and made._fused.head is not None
            results[name, parts] = made.spy.steps[0]
    if made.args.process_index == 0:
        torch.save(results, Path(sys.argv[1]) / "gradients.pt")
