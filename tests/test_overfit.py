"""A tiny run that must over-fit is diagnosed; so are one that cannot learn and one that generalises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments
from hf_reg.diagnosis import diagnose

from .distributed.heads import make, rows


def run(labels: str, learning_rate: float = 5e-3, **settings: Any) -> Any:
    """24 rows to learn from and 24 held out; labels of noise can only be learned by heart."""
    generator = torch.Generator().manual_seed(0)
    data = rows("classes/bert", 48)
    for row in data:
        if labels == "noise":
            row["labels"] = torch.randint(0, 3, (), generator=generator)
        else:
            row["input_ids"] = torch.full((12,), 10 + int(row["labels"]))
    args = RegularizedTrainingArguments(
        "unused", max_steps=60, per_device_train_batch_size=8, learning_rate=learning_rate, eval_strategy="steps",
        eval_steps=6, logging_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = RegularizedTrainer(
        model=make("classes/bert"), args=args, train_dataset=data[:24], eval_dataset=data[24:], **settings
    )
    trainer.train()
    return trainer


def test_learning_by_heart_is_diagnosed() -> None:
    report = diagnose(run("noise", penalties={"l2": 1e-6}))
    assert report.verdict == "over-fits" and report.gap > 0.5 and report.rise > 0.02
    assert report.best_step < report.last_step == 60 and 0 < report.shares["l2"] < 0.01
    advice = " ".join(report.next_steps)
    assert f"Stop near step {report.best_step}" in advice and 'patches="tlm"' in advice
    assert "Raise the weight of l2 tenfold" in advice
    assert (
        "over-fits" in str(report)
        and "callbacks=[early_stopping(args)]" in str(report)
        and "<pre" in report._repr_html_()
    )


def test_learning_is_not_accused() -> None:
    trainer = run("signal", learning_rate=1e-3)
    assert diagnose(trainer).verdict == "no sign of over-fitting"
    assert diagnose(trainer.state.log_history).verdict == "no sign of over-fitting"


def test_learning_nothing_is_diagnosed() -> None:
    report = diagnose(run("noise", learning_rate=0.0, penalties={"l2": 1.0}, patches="tlm"))
    assert report.verdict == "learns too little" and "Lower the weight of l2" in report.next_steps[0]


def test_too_few_logs() -> None:
    with pytest.raises(ValueError, match="found 1 training logs and 0 evaluations; it needs two of each"):
        diagnose([{"loss": 1.0, "step": 1}])
    with pytest.raises(TypeError, match="expects a Trainer"):
        diagnose(3)
