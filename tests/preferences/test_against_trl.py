"""The loss and every gradient of TRL's own DPO trainer, from the same rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from .models import gradients, llama, lora, one_batch, trainer
from .words import PLAIN, TURNS, tokenizer


trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
BETA, WEIGHT = 0.3, 0.7


def of_trl(folder: Path, model: Any, ref_model: Any, rows: list[dict[str, Any]], **settings: Any) -> Any:
    args = trl.DPOConfig(
        str(folder), report_to="none", use_cpu=True, bf16=False, max_length=64, beta=BETA, disable_tqdm=True,
        per_device_train_batch_size=len(rows), **settings,
    )  # fmt: skip
    return trl.DPOTrainer(
        model, ref_model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer()
    )


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys() and found
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["lora", "full", "tied"])
@pytest.mark.parametrize("eta", [WEIGHT, 0.0])
@pytest.mark.parametrize("rows", [PLAIN, TURNS])
@pytest.mark.parametrize("shared", [True, False])
def test_loss_and_gradients(kind: str, eta: float, rows: list[dict[str, Any]], shared: bool, tmp_path: Path) -> None:
    if kind == "lora":
        model, other = lora(moved=0.1), None
    else:
        model, other = (llama(seed, tie_word_embeddings=kind == "tied") for seed in (2, 3))
    losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, eta]} if eta else {"loss_type": ["sigmoid"]}
    theirs = of_trl(tmp_path, copy.deepcopy(model), copy.deepcopy(other), rows, **losses)
    ours = trainer(tmp_path, model, rows, ref_model=other, variant="trl", beta=BETA, eta=eta, share_prompts=shared)

    if "ref" in getattr(theirs.model, "peft_config", {}):  # a copy of the adapter as it was given, which is not ours
        theirs.model.delete_adapter("ref")
    batch = theirs._prepare_inputs(theirs.data_collator(list(theirs.train_dataset)))
    theirs.model.train()
    wanted = theirs.compute_loss(theirs.model, batch)
    wanted.backward()
    ours.model.train()
    ours.current_gradient_accumulation_steps = 1  # as in a run
    found = ours.compute_loss(ours.model, one_batch(ours))
    found.backward()

    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert largest_difference(gradients(ours.model), gradients(theirs.model)) < 1e-5
    assert ours._scores.head is not None and ours._scores.sharing.works is shared

    metrics = ours._means(True)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
                 "logps/rejected"):  # fmt: skip
        assert metrics[name] == pytest.approx(theirs._metrics["train"][name][0], rel=1e-4, abs=1e-5)
    assert metrics["loss_dpo"] + metrics["loss_sft"] == pytest.approx(wanted.item(), rel=1e-5)
