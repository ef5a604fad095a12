"""What `RPOTrainer` and `RPOConfig` refuse, and what they say."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig, LoraConfig, get_peft_model
from transformers import HfArgumentParser, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, TrainingArguments

import hf_reg
from hf_reg import RPOConfig, RPOTrainer
from hf_reg import messages as said_by
from hf_reg.losses.rpo import DEFAULTS
from hf_reg.preferences.data import REFERENCE

from .models import LINEAR, arguments, llama, lora, trainer
from .words import PLAIN, TURNS, tokenizer


def folded() -> Any:
    config = hf_reg.SorsaConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM", folded=True)
    return hf_reg.get_regularized_peft_model(llama(), config)


def merged() -> Any:
    model = lora(moved=0.1)
    model.merge_adapter()
    return model


def initialised(start: str) -> Any:
    """As PEFT leaves it with a method that needs data, gradients or a quantised base."""
    model = lora()
    model.peft_config["default"].init_lora_weights = start
    return model


def unfrozen() -> Any:
    model = lora()
    model.base_model.model.model.embed_tokens.weight.requires_grad_()
    return model


REMEDY = "Pass ref_model=AutoModelForCausalLM.from_pretrained"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (llama, "LlamaForCausalLM is trained as a whole, so no reference is left of it."),
        (lambda: lora(init_lora_weights="pissa"), "init_lora_weights='pissa', which rewrote the base weights"),
        (lambda: lora(init_lora_weights="pissa_niter_2"), "init_lora_weights='pissa_niter_2'"),
        (lambda: lora(init_lora_weights="olora"), "init_lora_weights='olora'"),
        *((partial(initialised, start), f"init_lora_weights={start!r}") for start in ("corda", "loftq", "lora_ga")),
        (lambda: lora(kasa_config=KasaConfig()), r"adapter 'default' \(KaSA\) truncated the base weights"),
        (lambda: lora(bias="all", target_modules=["q_proj"], model=llama(attention_bias=True)),
         "parameters of the base model are in training"),
        (folded, "is folded into the base weights"),
        (merged, "an adapter is merged into the base weights"),
        (unfrozen, "1 parameters of the base model are in training"),
    ],
)  # fmt: skip
def test_a_reference_that_is_gone(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        trainer(tmp_path, make())
    assert REMEDY in str(error.value)
    made = trainer(tmp_path, make(), ref_model=llama())  # the remedy is one
    assert str(made.reference) == "the given LlamaForCausalLM"


def test_a_reference_given_twice_or_that_is_the_policy(tmp_path: Path) -> None:
    rows = [{**row, **dict.fromkeys(REFERENCE, -1.0)} for row in PLAIN]
    with pytest.raises(ValueError, match="Two references: ref_model and the columns"):
        trainer(tmp_path, llama(), rows, ref_model=llama())
    model = llama()
    with pytest.raises(ValueError, match="ref_model is the model in training itself"):
        trainer(tmp_path, model, ref_model=model)


@pytest.mark.parametrize("settings", [{"target_modules": [*LINEAR, "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapted_head(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The head of LlamaForCausalLM is adapted .* Leave lm_head out"):
        trainer(tmp_path, lora(**settings))


def test_a_patch_that_acts_in_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head_mask acts in eval mode too, so the reference would carry it"):
        trainer(tmp_path, patches={"head_mask": {"heads": {0: [1]}}})
    trainer(tmp_path, llama(), ref_model=llama(), patches={"head_mask": {"heads": {0: [1]}}})


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_speaks(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(said_by.logger, "warning", messages.append)
    monkeypatch.setenv("RANK", rank)
    said_by.say("so")
    assert messages == ["so"] * (rank == "0")


def test_which_reference_and_formula_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(said_by.logger, "warning", messages.append)
    trainer(tmp_path)
    (message,) = messages
    assert "L = L_pref - eta * beta * mean_b( sum_t log pi(y_w,t) )" in message
    assert "beta = 0.01, eta = 0.005" in message
    assert message.endswith("Reference: LlamaForCausalLM with the adapter off.")
    trainer(tmp_path, lora(moved=0.1))
    assert "The adapter is not zero at the start" in messages[1]


def test_models_that_are_none(tmp_path: Path) -> None:
    other = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder; expected a causal"):
        trainer(tmp_path, other)
    with pytest.raises(TypeError, match="model is str; expected a model. Load it"):
        trainer(tmp_path, "gpt2")
    model = lora()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="no load-balancing loss"):
        trainer(tmp_path, model)


@pytest.mark.parametrize(
    ("name", "value"), [("compute_metrics", len), ("compute_loss_func", len), ("model_init", LlamaForCausalLM)]
)
def test_arguments_of_trainer_that_have_no_place(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"RPOTrainer takes no {name}: "):
        RPOTrainer(lora(), arguments(tmp_path), train_dataset=PLAIN, processing_class=tokenizer(), **{name: value})


def test_arguments_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args is TrainingArguments; expected RPOConfig"):
        RPOTrainer(lora(), TrainingArguments(str(tmp_path)), train_dataset=PLAIN, processing_class=tokenizer())
    with pytest.raises(ValueError, match="Preference data needs a tokenizer, found none"):
        RPOTrainer(lora(), arguments(tmp_path), train_dataset=PLAIN)
    with pytest.raises(ValueError, match="train_dataset is a stream"):
        trainer(tmp_path, rows=iter(PLAIN))
    with pytest.raises(ValueError, match="train_dataset, row 1: no column 'chosen'"):
        trainer(tmp_path, rows=[PLAIN[0], {"prompt": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="no chat template"):
        RPOTrainer(lora(), arguments(tmp_path), train_dataset=TURNS, processing_class=tokenizer(template=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rpo_alpha": 1.0}, "rpo_alpha had a meaning of its own in each version of TRL"),
        ({"variant": "sum"}, "variant='sum' is not known"), ({"base": "square"}, "base='square' is not known"),
        ({"beta": 0.0}, "beta=0.0 is out of range"), ({"eta": -1.0}, "eta=-1.0 is out of range"),
        ({"label_smoothing": 0.7}, "label_smoothing=0.7 is out of range"),
        ({"label_smoothing": 0.1, "base": "ipo"}, "label_smoothing has no meaning"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no place here"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True has no place here: it replaces the model's head"),
        ({"max_length": 4, "max_prompt_length": 4}, "leaves no room for an answer"),
        ({"truncation_mode": "middle"}, "truncation_mode='middle' is not known"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True would cut batches"),
    ],
)  # fmt: skip
def test_configurations_out_of_range(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


@pytest.mark.parametrize("variant", list(DEFAULTS))
def test_the_formula_is_printed_with_its_published_values(variant: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, variant=variant)
    assert (args.beta, args.eta) == DEFAULTS[variant]
    assert f"variant {variant!r}" in args.formula and f"beta = {args.beta}, eta = {args.eta}" in args.formula
    assert str(args).startswith(args.formula) and "learning_rate=0.01" in repr(args)
    shown = hf_reg.describe(args)
    lines = [line for line in str(shown).splitlines() if line.split()[1:3] == ["*", "│"] or "│ *" in line]
    assert len(lines) == 1 and variant in lines[0] and str(args.beta) in lines[0] and str(args.eta) in lines[0]
    words = "".join(str(shown).split())
    assert all(name in words for name in DEFAULTS) and "L_pref=mean_b(-logsigmoid(betah))" in words
    assert hf_reg.describe(trainer(tmp_path, variant=variant)) == shown
    assert RPOConfig(str(tmp_path), use_cpu=True, bf16=False).learning_rate == 5e-7


def test_a_lora_configuration_may_be_anything_that_keeps_the_base(tmp_path: Path) -> None:
    for start in (True, "gaussian"):
        trainer(tmp_path, lora(init_lora_weights=start))
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=LINEAR, use_dora=True, task_type="CAUSAL_LM"))
    made = trainer(tmp_path, model)
    made.train()
    assert made.state.log_history[0]["loss_dpo"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)


def test_the_command_line_says_it() -> None:
    line = "--output_dir x --variant average --eta 0.3 --max_prompt_length 512 --use_cpu --bf16 False"
    (args,) = HfArgumentParser(RPOConfig).parse_args_into_dataclasses(line.split())
    assert (args.variant, args.beta, args.eta, args.max_prompt_length) == ("average", 0.5, 0.3, 512)
