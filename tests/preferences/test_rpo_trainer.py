"""`RPOTrainer`: its loss at the start, however a step is cut, in evaluation, with what regularizes it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import hf_reg
from hf_reg import messages as said_by
from hf_reg.losses.rpo import DEFAULTS
from hf_reg.preferences import prepare_preferences
from hf_reg.preferences.data import REFERENCE

from .models import LINEAR, gradients, llama, lora, one_batch, trainer
from .words import PLAIN, TURNS, WORDS, tokenizer


def scores_by_hand(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sums of log-probs, a row at a time and without padding."""
    sums = []
    for ids, attended, answer in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        length = int(attended.sum())
        with torch.no_grad():
            logits = model(input_ids=ids[None, :length]).logits[0]
        found = torch.log_softmax(logits.float(), -1)[:-1].gather(1, ids[1:length, None])[:, 0]
        sums.append((found * answer[1:length]).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("variant", list(DEFAULTS))
def test_the_first_loss_is_log_2_and_the_likelihood_term(variant: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, variant=variant)
    batch = one_batch(made)
    chosen, lengths = scores_by_hand(made.model.eval(), batch)[: len(PLAIN)], batch["chosen_lengths"]
    beta, eta = DEFAULTS[variant]
    term = {
        "cumulative": -eta * beta * chosen.mean(),
        "average": -eta * (chosen / lengths).mean(),
        "trl": -eta * chosen.sum() / lengths.sum(),
    }[variant]
    made.train()
    logged = made.state.log_history[0]
    assert logged["loss"] == pytest.approx(math.log(2) + term.item(), rel=1e-5)
    assert logged["loss_dpo"] == pytest.approx(math.log(2), rel=1e-5)
    assert logged["loss_sft"] == pytest.approx(term.item(), rel=1e-4)
    assert logged["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert logged["rewards/margins"] == logged["rewards/accuracies"] == 0


@pytest.mark.parametrize("rows", [PLAIN, TURNS])
def test_scores_are_those_of_each_answer_alone(rows: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, lora(moved=0.1), rows)
    batch = one_batch(made)
    made.model.eval()
    torch.testing.assert_close(made._scores(batch)[0].detach(), scores_by_hand(made.model, batch))
    torch.testing.assert_close(made._scores(batch, whole=True)[0].detach(), scores_by_hand(made.model, batch))
    with made.model.disable_adapter():
        expected = scores_by_hand(made.model, batch)
    torch.testing.assert_close(made.reference(batch), expected)


def after_a_step(folder: Path, size: int, parts: int, **settings: Any) -> tuple[dict[str, torch.Tensor], dict]:
    model = lora(moved=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"beta": 0.3, "eta": 0.5, "train_sampling_strategy": "sequential", **settings}
    made = trainer(folder, model, per_device_train_batch_size=size, gradient_accumulation_steps=parts, **settings)
    made.train()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters() if p.requires_grad}
    return moved, made.state.log_history[0]


@pytest.mark.parametrize("variant", ["cumulative", "average"])
@pytest.mark.parametrize(("size", "parts"), [(1, 8), (2, 4), (3, 3)])
def test_a_step_is_the_same_however_it_is_cut(variant: str, size: int, parts: int, tmp_path: Path) -> None:
    whole, logged = after_a_step(tmp_path, 8, 1, variant=variant)
    found, log = after_a_step(tmp_path, size, parts, variant=variant)
    assert any(value.any() for value in whole.values())
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)
    for name in ("loss_dpo", "loss_sft", "rewards/margins", "rewards/accuracies", "logps/rejected"):
        assert log[name] == pytest.approx(logged[name], rel=1e-4)
    assert log["loss"] == pytest.approx(logged["loss"], rel=1e-4)


def test_evaluation(tmp_path: Path) -> None:
    made = trainer(tmp_path, lora(moved=0.1), eval_dataset=PLAIN, per_device_eval_batch_size=3, beta=0.3, eta=0.5)
    metrics = made.evaluate()
    made.model.eval()
    policy = scores_by_hand(made.model, one_batch(made))
    with made.model.disable_adapter():
        reference = scores_by_hand(made.model, one_batch(made))
    ratios = policy - reference
    h = ratios[: len(PLAIN)] - ratios[len(PLAIN) :]
    expected = -torch.nn.functional.logsigmoid(0.3 * h).mean() - 0.5 * 0.3 * policy[: len(PLAIN)].mean()
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["eval_loss_dpo"] + metrics["eval_loss_sft"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["eval_rewards/margins"] == pytest.approx(0.3 * h.mean().item(), rel=1e-4)
    assert metrics["eval_rewards/accuracies"] == pytest.approx((h > 0).float().mean().item())
    again = made.evaluate(PLAIN[:4], metric_key_prefix="other")  # rows as they were written
    assert "other_rewards/chosen" in again and "other_loss" in again
    several = made.evaluate({"one": PLAIN[:3], "two": TURNS})
    assert {"eval_one_loss", "eval_two_rewards/margins"} <= set(several)


def test_the_policy_learns_what_was_chosen(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, max_steps=20, learning_rate=0.02, beta=0.1, eta=0.1, optim="adamw_torch", eval_dataset=PLAIN,
        eval_strategy="steps", eval_steps=10,
    )  # fmt: skip
    made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert logs[-1]["rewards/accuracies"] == 1 and logs[-1]["rewards/margins"] > 1
    assert logs[-1]["logps/chosen"] > logs[0]["logps/chosen"]
    assert made.state.log_history[-2]["eval_rewards/accuracies"] == 1


class Noise(nn.Dropout):
    """Counts how often it was asked while it acts."""

    used = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.used += self.training and self.p > 0
        return super().forward(hidden)


@pytest.mark.parametrize("own", [False, True])
def test_the_reference_has_no_dropout_and_no_patches(own: bool, tmp_path: Path) -> None:
    """R9: it gives what the plain model gives, in the middle of training, and draws nothing."""
    model, other = lora(moved=0.1, lora_dropout=0.5), llama(7, attention_dropout=0.5) if own else None
    made = trainer(tmp_path, model, ref_model=other, patches=["tlm", {"drophead": {"p": 0.5}}], disable_dropout=False)
    batch = one_batch(made)
    with torch.no_grad():
        expected = scores_by_hand(other.eval(), batch) if own else None
        if not own:
            model.eval()
            with model.disable_adapter():
                expected = scores_by_hand(model, batch)
    made.model.train()
    if own:
        other.train()  # somebody else's doing
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    found = made.reference(batch)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad and torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    one, two = made._scores(batch)[0], made._scores(batch)[0]
    assert not torch.equal(one, two)  # the policy has patches and dropout


def test_dropout_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    model = lora(llama(attention_dropout=0.3), moved=0.1, lora_dropout=0.5)
    made = trainer(tmp_path, model)
    made.model.train()
    batch = one_batch(made)
    torch.testing.assert_close(made._scores(batch)[0], made._scores(batch)[0], rtol=0, atol=0)
    assert model.config.attention_dropout == 0.3
    made = trainer(tmp_path, lora(moved=0.1), patches={"drophead": {"p": 0.5}})
    made.model.train()
    assert not torch.equal(made._scores(batch)[0], made._scores(batch)[0])


def stored(made: Any, batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    chosen, rejected = made.reference(batch).chunk(2)
    columns = zip(PLAIN, chosen.tolist(), rejected.tolist(), strict=True)
    return [{**row, REFERENCE[0]: one, REFERENCE[1]: other} for row, one, other in columns]


def test_stored_log_probs_are_the_reference(tmp_path: Path) -> None:
    made = trainer(tmp_path, lora(moved=0.1))
    rows = stored(made, one_batch(made))
    whole = llama(3)
    with_columns = trainer(tmp_path, whole, rows, eval_dataset=rows)
    assert str(with_columns.reference) == "the log-probs stored as ref_chosen_logps and ref_rejected_logps"
    torch.testing.assert_close(with_columns.reference(one_batch(with_columns)), made.reference(one_batch(made)))
    with_columns.train()
    assert "eval_loss" in with_columns.evaluate()
    with pytest.raises(ValueError, match="eval_dataset has no ref_chosen_logps and ref_rejected_logps, other data"):
        with_columns.evaluate(PLAIN)
    with pytest.raises(ValueError, match="eval_dataset has no ref_chosen_logps"):
        trainer(tmp_path, whole, rows, eval_dataset=PLAIN)
    with pytest.raises(ValueError, match="eval_dataset has ref_chosen_logps and .* other data of this run has none"):
        trainer(tmp_path, eval_dataset=rows)
    batch = {key: value for key, value in one_batch(with_columns).items() if key not in REFERENCE}
    with pytest.raises(ValueError, match="this batch has no ref_chosen_logps and ref_rejected_logps. Give the"):
        with_columns.reference(batch)


def test_limits_of_pairs_that_are_token_ids_already(tmp_path: Path) -> None:
    pairs = prepare_preferences(PLAIN, tokenizer(), max_length=64)
    assert trainer(tmp_path, rows=pairs).train_dataset is pairs
    assert len(trainer(tmp_path, rows=pairs, max_length=28).train_dataset) == len(PLAIN) - 1  # checked again


@pytest.mark.parametrize("method", ["sorsa", "balora"])
def test_svd_adapters_start_at_the_reference(method: str, tmp_path: Path) -> None:
    """R6, and their penalties join the loss."""
    settings = {"r": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    coupled = hf_reg.SorsaConfig(orthonormality="coupled", **settings)
    config = coupled if method == "sorsa" else hf_reg.BALoraConfig(**settings)
    model = hf_reg.get_regularized_peft_model(llama(), config)
    made = trainer(tmp_path, model, eval_dataset=PLAIN)
    made.train()
    logged = made.state.log_history[0]
    assert logged["loss_dpo"] == pytest.approx(math.log(2), rel=1e-5)
    own = {"loss_dpo", "loss_sft"}
    terms = [value for name, value in logged.items() if name.startswith("loss_") and name not in own]
    assert len(terms) > 1 and logged["loss"] == pytest.approx(sum(terms), rel=1e-4)
    assert "eval_loss" in made.evaluate()


def test_penalties_on_outputs_see_every_logit(tmp_path: Path) -> None:
    seen: list[Any] = []

    def mine(model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
        seen.append((sorted(inputs), outputs.logits.shape, outputs.logits.requires_grad))
        return outputs.logits.square().mean()

    made = trainer(tmp_path, lora(moved=0.1), penalties={"mine": (0.1, mine)})
    made.train()
    batch = one_batch(made)
    assert seen == [(["attention_mask", "input_ids", "labels"], (*batch["input_ids"].shape, WORDS), True)]
    assert "loss_mine" in made.state.log_history[0]


class Doubled(nn.Module):
    """A head that is no linear map; one that `mixes` positions sees them all."""

    def __init__(self, inner: nn.Linear, mixes: bool) -> None:
        super().__init__()
        self.inner, self.mixes = inner, mixes

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.inner(hidden) + torch.sin(self.inner(hidden))
        return logits + 3 * self.inner(hidden[:, :1]) if self.mixes else logits


@pytest.mark.parametrize("mixes", [False, True])
def test_other_heads_are_the_models_own(mixes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handed answer positions, or, where their logits depend on other positions, all of them."""
    messages: list[str] = []
    monkeypatch.setattr(said_by.logger, "warning", messages.append)
    base = llama()
    base.lm_head = Doubled(base.lm_head, mixes)  # type: ignore[assignment]
    made = trainer(tmp_path, lora(base, moved=0.1))
    batch = one_batch(made)
    made.model.eval()
    torch.testing.assert_close(made._scores(batch)[0].detach(), scores_by_hand(made.model, batch))
    made._scores(batch)
    (message,) = [message for message in messages if "not in chunks" in message]
    assert message.startswith(
        "Log-probs of PeftModelForCausalLM are computed from whole logits, not in chunks: the head of "
        if mixes
        else "Logits of PeftModelForCausalLM are computed at all answer positions, not in chunks: the head of "
    )
    assert ("depend on all positions" in message) is mixes and "LlamaForCausalLM is no plain linear map" in message
    made.train()


@pytest.mark.parametrize("settings", [{"target_modules": [*LINEAR, "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_reference_with_an_adapted_head(settings: dict[str, Any], tmp_path: Path) -> None:
    other = lora(moved=0.1, **settings)
    if "modules_to_save" in settings:
        nn.init.normal_(other.get_base_model().lm_head.modules_to_save["default"].weight, std=0.2)
    made = trainer(tmp_path, lora(llama(2)), ref_model=other)
    batch = one_batch(made)
    expected = scores_by_hand(other, batch)
    torch.testing.assert_close(made.reference(batch), expected)
    with other.disable_adapter():
        assert not torch.allclose(expected, scores_by_hand(other, batch))


def test_the_head_meets_answers_only(tmp_path: Path) -> None:
    """No logits of all positions, neither in training nor in evaluation."""
    made = trainer(tmp_path, lora(moved=0.1), eval_dataset=PLAIN)
    batch = one_batch(made)
    made._scores.prepare(batch)
    shapes: list[Any] = []
    hook = made.model.get_output_embeddings().register_forward_hook(lambda *all: shapes.append(all[2].shape))
    made.train()
    made.evaluate()
    hook.remove()
    assert shapes and all(shape[1] == 1 for shape in shapes)


def test_prompt_tuning_puts_positions_in_front(tmp_path: Path) -> None:
    made = trainer(tmp_path, get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))
    batch = one_batch(made)
    made.model.eval()
    torch.testing.assert_close(made._scores(batch)[0], made._scores(batch, whole=True)[0])
    torch.testing.assert_close(made.reference(batch), scores_by_hand(made.model.base_model, batch))
    made.train()
    assert made._scores.head is not None


def test_gradient_checkpointing_gives_the_same_step(tmp_path: Path) -> None:
    plain, _ = after_a_step(tmp_path, 8, 1)
    saved, _ = after_a_step(tmp_path, 8, 1, gradient_checkpointing=True)
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-7)


def test_another_architecture_and_bf16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    made = trainer(tmp_path, lora(GPT2LMHeadModel(config), target_modules=["c_attn"]), bf16=True)
    made.train()
    assert made._scores.head is not None
    assert made.state.log_history[0]["loss_dpo"] == pytest.approx(math.log(2), rel=1e-3)


def test_a_run_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "optim": "adamw_torch", "beta": 0.3}
    whole = trainer(tmp_path / "a", **settings)
    whole.train()
    first = trainer(tmp_path / "b", save_strategy="steps", save_steps=2, **settings)
    first.train()
    second = trainer(tmp_path / "b", **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_data_sets_of_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = trainer(tmp_path, lora(moved=0.1), datasets.Dataset.from_list(TURNS))
    made.train()
    assert gradients(made.model) == {} and math.isfinite(made.state.log_history[0]["loss"])
    assert tokenizer().pad_token_id == made.data_collator.pad_token_id


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_autocast_keeps_every_gradient_of_the_first_step(kind: str, tmp_path: Path) -> None:
    """Weights that autocast casts without gradients (reference, trial of the head) are not the ones it trains with."""
    model = llama() if kind == "full" else lora(moved=0.1)
    made = trainer(tmp_path, model, ref_model=llama(3) if kind == "full" else None, bf16=True)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    steps = []
    for _ in range(2):
        made.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = made.compute_loss(made.model, one_batch(made))
        loss.backward()
        steps.append(gradients(made.model))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert steps[0].keys() == steps[1].keys() == names
    for name, value in steps[1].items():
        torch.testing.assert_close(steps[0][name], value)
