"""Cells: the same bits each time and in any order, the same start for all methods, and what is measured on them."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from hf_reg import describe
from hf_reg.comparison.measures import BINS, Bins, Diverged, evaluated
from hf_reg.comparison.plan import read_plan
from hf_reg.comparison.running import Runner, apply_dropout

from ..tiny_runs import bert
from .tiny import recipe


METHODS = {
    "hf_default": None, "no_dropout": None, "tlm": {"penalties": {"l2_sp": 0.1}},
    "sorsa": {"adapter": {"type": "sorsa", "r": 2}},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """As in a worker: looking through all modules after each cell would take longer than the cell."""
    gc.freeze()
    yield
    gc.unfreeze()


def runner(folder: Path, task: str = "sequence-classification", **compare: Any) -> Runner:
    return Runner(read_plan(recipe(folder, task, **compare)))


def cells(run: Runner, order: list[tuple[str, int]]) -> dict[tuple[str, int], str]:
    found = {}
    for method, seed in order:
        torch.rand(7)  # whatever ran before
        found[method, seed] = json.dumps(run.cell(run.plan.settings(method), 4, seed))
    return found


def test_numbers_are_the_same_bits_in_any_order(tmp_path: Path) -> None:
    order = [("hf_default", 0), ("tlm", 0), ("sorsa", 1), ("tlm", 1)]
    first = cells(runner(tmp_path, methods=METHODS), order)
    assert cells(runner(tmp_path, methods=METHODS), order[::-1]) == first
    assert len(set(first.values())) == len(first)


def test_methods_start_alike_and_see_the_same_rows(tmp_path: Path) -> None:
    run, heads, orders = runner(tmp_path, methods=METHODS), [], []
    for method in METHODS:
        trainer = run.trainer(run.plan.settings(method), 4, 1, str(tmp_path / "run"), run.samples.held_out)
        head = next(p for n, p in trainer.model.named_parameters() if "classifier" in n and "weight" in n)
        heads.append(head.detach().clone())
        set_seed(len(orders))  # methods draw as much as they like
        orders.append([batch["input_ids"].tolist() for _ in range(2) for batch in trainer.get_train_dataloader()])
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert all(order == orders[0] for order in orders)


def test_what_is_measured(tmp_path: Path) -> None:
    run = runner(tmp_path, methods=METHODS, evaluate_every=2)
    found = run.cell(run.plan.settings("tlm"), 4, 0)
    measures, last = found["measures"], found["history"][-1]
    assert [point["step"] for point in found["history"]] == [2, 4]
    assert measures["eval_loss"] == last["eval_loss"] and measures["accuracy"] == last["accuracy"]
    assert measures["gap"] == measures["eval_loss"] - measures["train_loss"]
    assert 0 < measures["drift"] < 2 and 0 <= measures["ece"] <= 1
    assert sum(one["count"] for one in found["calibration"]) == 8 and len(found["calibration"]) == BINS
    right = sum(one["count"] * one["accuracy"] for one in found["calibration"])
    assert right / 8 == pytest.approx(measures["accuracy"])
    assert 0 < found["penalties"]["l2_sp"] < 1


def test_measures_are_those_of_the_model(tmp_path: Path) -> None:
    """Losses and confidences again, from the logits, of a run whose trainer smooths labels."""
    methods = {"hf_default": None, "smooth": {"train": {"label_smoothing_factor": 0.5}}}
    run = runner(tmp_path, methods=methods)
    settings = run.plan.settings("smooth")
    measured = run.cell(settings, 4, 0)["measures"]
    trainer, curve = run._trained(settings, 4, 0, str(tmp_path / "run"), run.samples.held_out, lambda *_: False)
    for dataset, name in ((trainer.eval_dataset, "eval_loss"), (trainer.train_dataset, "train_loss")):
        (batch,) = trainer.get_eval_dataloader(dataset)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = trainer.model.eval()(**batch).logits
        assert float(torch.nn.functional.cross_entropy(logits, labels)) == pytest.approx(measured[name], rel=1e-5)
        if name == "eval_loss":
            top, chosen = logits.softmax(-1).max(-1)
            error = 0.0
            for low in range(BINS):
                inside = (top * BINS).long() == low
                error += abs(float((top - (chosen == labels).float())[inside].sum())) / len(labels)
            assert measured["ece"] == pytest.approx(error, abs=1e-6)


def test_confidence_of_a_language_model_is_that_of_the_next_token(tmp_path: Path) -> None:
    run = runner(tmp_path, "causal-lm")
    trainer = run.trainer(run.plan.settings("hf_default"), 4, 0, str(tmp_path / "run"), run.samples.held_out)
    right, count, confidence = 0, 0, 0.0
    for row in trainer.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            top, chosen = trainer.model.eval()(input_ids=ids).logits[:, :-1].softmax(-1).max(-1)
        right, count = right + int((chosen == ids[:, 1:]).sum()), count + ids.shape[1] - 1
        confidence += float(top.sum())
    found = Bins("next")
    evaluated(trainer, run.plan.recipe.further_metrics, found)
    bins = found.lines()
    assert sum(one["count"] for one in bins) == count
    assert sum(one["count"] * one["accuracy"] for one in bins) == pytest.approx(right)
    assert sum(one["count"] * one["confidence"] for one in bins) == pytest.approx(confidence, rel=1e-4)


PAIRS = {
    "hf_default": None, "tlm": None, "dpo": {"train": {"eta": 0.0, "beta": 0.7}},
    "sorsa": {"adapter": {"type": "sorsa", "r": 2}},
}  # fmt: skip


@pytest.mark.parametrize("change", ["train.precompute_reference=true", "adapter={type: lora, r: 2}"])
def test_preferences_are_compared(tmp_path: Path, change: str) -> None:
    run = Runner(read_plan(recipe(tmp_path, "preference", methods=PAIRS), [change]))
    found = {name: run.cell(run.plan.settings(name), 4, 0) for name in PAIRS}
    assert json.dumps(run.cell(run.plan.settings("tlm"), 4, 0)) == json.dumps(found["tlm"])
    measures = [one["measures"] for one in found.values()]
    assert len({one["eval_loss"] for one in measures}) == len(PAIRS)
    assert all(one["ece"] is None and one["drift"] > 0 and 0 <= one["rewards/accuracies"] <= 1 for one in measures)


def test_the_loss_of_preferences_is_the_recipes_whatever_a_method_trains_with(tmp_path: Path) -> None:
    run = Runner(read_plan(recipe(tmp_path, "preference", methods=PAIRS), ["train.precompute_reference=true"]))
    trainer, curve = run._trained(run.plan.settings("dpo"), 4, 0, str(tmp_path / "run"), run.samples.held_out, goes_on)
    assert (trainer.args.eta, trainer.args.beta) == (0.0, 0.7)
    own = trainer.evaluate()
    assert own["eval_loss_sft"] == 0 and curve[-1]["loss_sft"] > 0
    trainer.args.eta, trainer.args.beta = 0.5, 0.3  # as in the recipe
    assert trainer.evaluate()["eval_loss"] == pytest.approx(curve[-1]["eval_loss"], rel=1e-6)
    assert own["eval_loss"] != pytest.approx(curve[-1]["eval_loss"], rel=0.1)


def goes_on(step: int, loss: float) -> bool:
    return False


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm", "seq2seq"])
def test_an_untouched_model_has_not_drifted_and_a_moved_one_has(tmp_path: Path, task: str) -> None:
    run = runner(tmp_path, task)
    trainer = run.trainer(run.plan.settings("hf_default"), 4, 0, str(tmp_path / "run"), run.samples.held_out)
    assert run.base.drift(trainer.model) == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert run.base.drift(trainer.model) > 1e-4


def test_drift_of_a_language_model_is_kl(tmp_path: Path) -> None:
    run = runner(tmp_path, "causal-lm")
    trainer = run.trainer(run.plan.settings("hf_default"), 4, 0, str(tmp_path / "run"), run.samples.held_out)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    divergences = []
    for text in run.samples.probes:
        ids = run.base.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            before, after = (
                m.eval()(**ids).logits[0].double().log_softmax(-1) for m in (run.base.model, trainer.model)
            )
        divergences += (before.exp() * (before - after)).sum(-1).tolist()
    assert run.base.drift(trainer.model) == pytest.approx(sum(divergences) / len(divergences), rel=1e-5)


def test_measuring_changes_nothing_of_the_training(tmp_path: Path) -> None:
    run = runner(tmp_path, methods=METHODS)
    often = Runner(read_plan(recipe(tmp_path, methods=METHODS, evaluate_every=1)))
    settings = run.plan.settings("tlm")
    once = Runner(read_plan(recipe(tmp_path, methods=METHODS, evaluate_every=100)))
    assert often.cell(settings, 4, 0)["measures"] == once.cell(settings, 4, 0)["measures"]


def test_no_dropout_is_none_at_all(tmp_path: Path) -> None:
    model = bert()
    apply_dropout(model, None)
    assert model.dropout.p == 0.1 and model.bert.encoder.layer[0].attention.self.dropout.p == 0.1
    apply_dropout(model, {"hidden": 0.2, "head": 0.4})
    assert model.dropout.p == 0.4 and model.bert.embeddings.dropout.p == 0.2
    assert model.bert.encoder.layer[0].attention.self.dropout.p == 0.1
    apply_dropout(model, 0.3)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    apply_dropout(model, 0.0)
    ids = torch.arange(5, 15)[None]
    first, second = (model.train()(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second)


def test_a_method_is_what_it_says(tmp_path: Path) -> None:
    run = runner(tmp_path, methods=METHODS)
    made = {
        name: run.trainer(run.plan.settings(name), 4, 0, str(tmp_path / "run"), run.samples.held_out)
        for name in METHODS
    }
    assert "tlm" in str(describe(made["tlm"].model)) and made["tlm"].penalties[0].name == "l2_sp"
    assert type(made["sorsa"].model).__name__.startswith("Peft") and not made["hf_default"].penalties
    assert made["no_dropout"].model.dropout.p == 0 and made["hf_default"].model.dropout.p == 0.1


def test_a_run_that_diverges_is_an_error(tmp_path: Path) -> None:
    run = runner(tmp_path)
    settings = run.plan.settings("hf_default") | {"train": {"learning_rate": 1e30, "max_grad_norm": 0}}
    with pytest.raises(Diverged):
        run.cell(settings, 4, 0)


def test_every_task_has_cells(tmp_path: Path) -> None:
    expected = {
        "token-classification": ("accuracy", True), "causal-lm": ("perplexity", True), "seq2seq": ("eval_loss", True),
        "question-answering": ("f1", False),
    }  # fmt: skip
    for task, (metric, calibrated) in expected.items():
        (tmp_path / task).mkdir()
        run = runner(tmp_path / task, task, sizes=[3])
        measures = run.cell(run.plan.settings("tlm"), 3, 0)["measures"]
        assert math.isfinite(measures[metric]) and (measures["ece"] is not None) == calibrated, task
