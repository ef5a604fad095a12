"""The section `compare` is read as it is meant; whatever is wrong is said before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_reg.cli import app
from hf_reg.comparison.methods import KNOWN, with_params
from hf_reg.comparison.plan import read_plan
from hf_reg.runs.errors import RecipeError
from hf_reg.yaml_text import load_yaml

from ..distributed.launch import ROOT
from .tiny import recipe


def test_default_methods_by_task(tmp_path: Path) -> None:
    plain = ["no_dropout", "hf_default", "tlm", "drophead"]
    for task, adapters in {"sequence-classification": ["sorsa"], "causal-lm": ["sorsa", "balora"]}.items():
        (tmp_path / task).mkdir()
        path = recipe(tmp_path / task, task, methods=None)
        assert list(read_plan(path).methods) == [*plain, *adapters]
        tuned = read_plan(path, ["compare.tuning={trials: 3}"])
        assert list(tuned.methods) == [*plain[:2], "tuned_dropout", *plain[2:], *adapters]
        assert list(read_plan(path, ["adapter={type: lora, target_modules: all-linear}"]).methods) == plain


def test_settings_of_known_methods_and_of_own_ones(tmp_path: Path) -> None:
    methods = {"hf_default": None, "tlm": {"patches": {"tlm": {"rate": 0.3}}}, "mine": {"penalties": {"l2_sp": 0.1}}}
    plan = read_plan(recipe(tmp_path, methods=methods), sizes=[0.5], **{"train.max_steps": 7})
    assert plan.settings("tlm")["patches"] == {"tlm": {"rate": 0.3}} and plan.methods["tlm"].label == "TLM"
    assert plan.settings("mine") == {
        "dropout": None, "patches": None, "penalties": {"l2_sp": 0.1}, "train": {}, "adapter": None,
    }  # fmt: skip
    assert plan.compare.sizes == [0.5] and plan.recipe.train["max_steps"] == 7
    sorsa = read_plan(recipe(tmp_path, methods=["hf_default", "sorsa"])).settings("sorsa")
    assert sorsa["train"]["learning_rate"] == pytest.approx(0.1)  # ten times that of the whole model


def test_what_is_searched(tmp_path: Path) -> None:
    search = {"tlm": {"patches.tlm.rate": None, "train.weight_decay": {"low": 0, "high": 1}}}
    plan = read_plan(recipe(tmp_path, tuning={"trials": 2, "search": search}))
    assert list(plan.methods["tlm"].ranges) == ["train.learning_rate", "train.weight_decay"]
    rate = plan.methods["hf_default"].ranges["train.learning_rate"]
    assert (rate.low, rate.high, rate.log) == (pytest.approx(0.0025), pytest.approx(0.04), True)
    adapters = read_plan(recipe(tmp_path, methods=["hf_default", "sorsa"], tuning={"trials": 2}))
    of_adapter = adapters.methods["sorsa"].ranges["train.learning_rate"]  # from the model's rates to ten times these
    assert (of_adapter.low, of_adapter.high) == (pytest.approx(0.0025), pytest.approx(0.4))
    assert plan.compare.tuning is not None and plan.compare.tuning.seeds == [1000, 1001, 1002]
    changed = with_params(plan.settings("tlm"), {"patches.tlm.rate": 0.4, "train.learning_rate": 0.2})
    assert changed["patches"] == {"tlm": {"rate": 0.4}} and changed["train"] == {"learning_rate": 0.2}
    assert plan.settings("tlm")["patches"] == {"tlm": {"rate": 0.1}}


@pytest.mark.parametrize("tuning", ["none", {"trials": 3, "search": {"tlm": {"patches.tlm.rate": None}}}])
def test_the_resolved_recipe_is_the_recipe(tmp_path: Path, tuning: Any) -> None:
    plan = read_plan(recipe(tmp_path, tuning=tuning, probe=str(tmp_path / "rows.jsonl")))
    again = read_plan(plan.tree())
    assert again.tree() == plan.tree()
    assert {name: again.settings(name) for name in again.methods} == {n: plan.settings(n) for n in plan.methods}
    ranges = {name: method.ranges for name, method in plan.methods.items()}
    assert tuning == "none" or {name: method.ranges for name, method in again.methods.items()} == ranges


WRONG = {
    "compare.metods=x": "compare.metods: unknown key. Did you mean 'methods'?",
    "compare.methods=[tml, hf_default]": "compare.methods: 'tml' is not known. Did you mean 'tlm'?",
    "compare.methods=[3]": "compare.methods: expected names or a section of keys, found 3 in a list.",
    "compare.methods.mine.patchs=1": "--set compare.methods.mine.patchs=1: compare.methods is [",
    "compare.methods={hf_default: null, mine: {patchs: 1}}": "compare.methods.mine.patchs: unknown key. Did you mean",
    "compare.methods={hf_default: null, mine: {patches: tml}}": "compare.methods.mine: patches: Unknown patch 'tml'",
    "compare.methods={hf_default: null, mine: {dropout: 1.5}}": "compare.methods.mine: dropout: dropout=1.5 is out",
    "compare.methods={hf_default: null, mine: {dropout: {hiden: 0}}}": "compare.methods.mine.dropout.hiden: unknown",
    "compare.methods={hf_default: null, mine: {train: {max_steps: 9}}}": "compare.methods.mine.train.max_steps: is",
    "compare.methods={hf_default: null, mine: {train: {seed: 9}}}": "compare.methods.mine.train.seed: is the",
    "compare.methods={hf_default: null, m: {dropout: 0, patches: hidden_dropout}}": "compare.methods.m: dropout and",
    "compare.methods=[tlm]": "compare.reference: 'hf_default' is no method here. Methods: tlm.",
    "compare.methods=[hf_default, tuned_dropout]": "compare.methods: tuned_dropout is what a search finds.",
    "compare.sizes=[0]": "compare.sizes[0]: 0 is no size.",
    "compare.sizes=[1.5]": "compare.sizes[0]: 1.5 is no size.",
    "compare.sizes=[4, 4]": "compare.sizes: found [4, 4]; give sizes, each once.",
    "compare.seeds=[1, 1]": "compare.seeds: found [1, 1]",
    "compare.seeds=0": "compare.seeds: found 0",
    "compare.alpha=1": "compare.alpha: 1 is out of range",
    "compare.threads=0": "compare.threads: 0 is out of range",
    "compare.cost_steps=1": "compare.cost_steps: one step has no quartiles",
    "compare.tuning={seeds: [1]}": "compare.tuning.seeds: [1] has seeds of the comparison.",
    "compare.tuning={trials: 0}": "compare.tuning: found 0 trials",
    "compare.tuning={search: {tml: {}}}": "compare.tuning.search.tml: is no method here. Did you mean 'tlm'?",
    "compare.tuning={search: {tlm: {x: {low: 2, high: 1}}}}": "compare.methods.tlm.search.x: found low 2 and high 1",
    "compare.tuning={search: {tlm: {x: {low: 0, high: 1, log: true}}}}": "compare.methods.tlm.search.x: low is 0",
    "patches=tlm": "patches: here methods regularize.",
    "data.eval=null": "data.eval: missing.",
    "train.load_best_model_at_end=true": "train.load_best_model_at_end: has no place in a comparison",
    "train.learning_rte=1": "compare.methods.no_dropout: train.learning_rte: unknown key.",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_recipes(tmp_path: Path, change: str) -> None:
    path = recipe(tmp_path)
    done = CliRunner().invoke(app, ["compare", str(path), "--check", "--set", change])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(f"hf-reg compare {path}: {WRONG[change]}"), done.stderr
    assert not (tmp_path / "results").exists()


def test_missing_packages_are_named_with_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_reg.comparison.plan.find_spec", lambda name: None if name == "optuna" else True)
    with pytest.raises(RecipeError, match=r'optuna is not installed.*pip install "hf_reg\[compare\]"'):
        read_plan(recipe(tmp_path))


def test_the_example_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = load_yaml((ROOT / "examples/recipes/compare_classification.yaml").read_text())
    rows = str(recipe(tmp_path).parent / "rows.jsonl")
    tree["data"] |= {"train": rows, "eval": rows}
    plan = read_plan(tree)
    assert set(plan.methods) - set(KNOWN) == {"r_drop"} and plan.methods["r_drop"].search.keys() == {
        "train.learning_rate", "penalties.r_drop.weight",
    }  # fmt: skip
    assert with_params(plan.settings("r_drop"), {"penalties.r_drop.weight": 2.0})["penalties"] == {
        "r_drop": {"weight": 2.0}
    }


def test_check_shows_the_plan_and_loads_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(recipe(tmp_path)), "--check"])
    assert done.exit_code == 0 and "6, and 0 trials" in done.stdout and "give 7 or more" in done.stdout
    searched = ["--set", "compare.tuning={trials: 4}"]
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "recipe.yaml"), "--check", *searched])
    assert "4 trials of each method, under 3 seeds" in done.stdout
    assert not (tmp_path / "results").exists()
