"""Recipes are read as they are meant, and whatever is wrong with one is said in a line before anything loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict

from hf_reg.recipes import make_penalties
from hf_reg.runs import load_recipe
from hf_reg.runs.errors import RecipeError
from hf_reg.runs.tasks import TASKS
from hf_reg.yaml_text import dump_yaml, load_yaml

from .distributed.launch import environment
from .tiny_runs import refused, train, write


# ---- YAML


def test_plain_values() -> None:
    text = "{a: 1e-4, b: no, c: 12:30, d: 1.0e-5, e: -3, f: , g: true, h: '1e-4', i: 010, j: .5, k: 2024-01-01}"
    assert load_yaml(text) == {
        "a": 1e-4, "b": "no", "c": "12:30", "d": 1e-5, "e": -3, "f": None, "g": True, "h": "1e-4", "i": "010",
        "j": 0.5, "k": "2024-01-01",
    }  # fmt: skip


def test_what_is_written_is_read_back() -> None:
    values = {"a": 1e-5, "b": "no", "c": "1e-4", "d": "true", "e": None, "f": [1, 2.5, "x: y"], "g": "12:30", "h": ""}
    assert load_yaml(dump_yaml(values)) == values == yaml.safe_load(dump_yaml(values))


@pytest.mark.parametrize("text", ["!!python/object/apply:os.getcwd []", "!!python/name:os.system", "{a: 1, a: 2}"])
def test_no_objects_and_no_key_twice(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_a_small_weight_on_a_command_line_is_a_number() -> None:
    assert make_penalties("l2_sp: 1e-3")[0].weight == 1e-3


# ---- --set


def test_set(tmp_path: Path) -> None:
    path = write(tmp_path, "preference", adapter=None)
    changes = ["train.learning_rate=1e-4", "adapter.type=sorsa", "adapter.gamma=5E-3", "train.save_strategy=no"]
    recipe = load_recipe(path, [*changes, "penalties=null", "train.eta=0", "data.eval=null", "ref_model=a/b"])
    assert recipe.train["learning_rate"] == 1e-4 and recipe.train["save_strategy"] == "no"
    assert recipe.adapter == {"type": "sorsa", "gamma": 5e-3} and recipe.penalties is None
    assert recipe.train["eta"] == 0 and recipe.data.eval is None and recipe.ref_model.name == "a/b"  # type: ignore
    assert load_recipe(path).train["learning_rate"] == 0.01
    assert load_yaml(recipe.resolved())["data"] == {"train": str(tmp_path / "rows.jsonl")}


def test_the_resolved_recipe_is_the_recipe(tmp_path: Path) -> None:
    for task in TASKS:
        (tmp_path / task).mkdir()
        recipe = load_recipe(write(tmp_path / task, task), ["model.dtype=bfloat16", "patches.tlm.rate=0.2"])
        (tmp_path / "again.yaml").write_text(recipe.resolved())
        assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.max_steps", "expected KEY=VALUE, such as --set train.learning_rate=1e-4"),
        ("train..max_steps=1", "expected KEY=VALUE"),
        ("train.max_steps.x=1", "train.max_steps is 4, which has no keys below it"),
        ("train.max_steps=[1", "the value is not YAML"),
    ],
)
def test_changes_that_cannot_be_made(tmp_path: Path, change: str, message: str) -> None:
    assert message in refused(write(tmp_path, "preference"), "--set", change)


# ---- refusals


WRONG = {
    "taks=preference": "taks: unknown key. Did you mean 'task'?",
    "task=preferences": "task: 'preferences' is not known. Did you mean 'preference'? Known tasks: pref",
    "task=[preference]": "task: ['preference'] is not known",
    "modle=x": "modle: unknown key. Did you mean 'model'?",
    "model.nmae=x": "model.nmae: unknown key. Did you mean 'name'?",
    "model={nmae: x}": "model.nmae: unknown key. Did you mean 'name'?",
    "model={}": "model.name: missing. Give a folder or a name on the Hub.",
    "model=./nowhere": "model: './nowhere' is no folder",
    "model={name: a/b, dtype: bf16}": "model.dtype: 'bf16' is not known; choose one of auto, float32",
    "data.trian=x": "data.trian: unknown key. Did you mean 'train'?",
    "data={eval: x}": "data.train: missing.",
    "data.train=nowhere.jsonl": "data.train: there is no file 'nowhere.jsonl'",
    "data.eval=nowhere.jsonl": "data.eval: there is no file 'nowhere.jsonl'",
    "data.train=3": "data.train: expected text, found 3 (an integer).",
    "data.columns.chosn=x": "data.columns.chosn: unknown key. Did you mean 'chosen'?",
    "data.columns={chosen: a, rejected: a}": "data.columns: 'a' stands for two columns.",
    "data.config=x": "data.config: is for data.name",
    "data.max_tokens=3": "data.max_tokens: unknown key.",
    "train=3": "train: expected a section of keys, found 3 (an integer).",
    "train.output_dir=null": "train.output_dir: missing.",
    "train.learning_rte=1": "train.learning_rte: unknown key. Did you mean 'learning_rate'?",
    "train.learning_rate=fast": "train.learning_rate: expected a number, found 'fast' (text).",
    "train.max_steps=1.5": "train.max_steps: expected an integer, found 1.5 (a number).",
    "train.bf16=yes": "train.bf16: expected true or false, found 'yes' (text).",
    "train.variant=trk": "train: rpo_loss: variant='trk' is not known; choose one of 'cumulative', 'average', 'trl'.",
    "train.optim=adam": "train: adam is not a valid OptimizerNames",
    "train.penalties={l1: 1}": "train.penalties: has no place here; it has a section of its own",
    "train.resume_from_checkpoint=x": "train.resume_from_checkpoint: has no place here; write resume: true",
    "train.hub_token=x": "train.hub_token: has no place here",
    "train.resume=3": "train.resume: expected true or false or text, found 3 (an integer).",
    "train.resume=nowhere": "train.resume: 'nowhere' is no checkpoint.",
    "adapter={r: 8}": "adapter.type: missing. Give one of lora, sorsa, balora, none.",
    "adapter.type=loar": "adapter.type: 'loar' is not known. Did you mean 'lora'?",
    "adapter={type: none, r: 8}": "adapter.type: none takes no r.",
    "adapter.rank=8": "adapter.rank: unknown key.",
    "adapter.target_module=x": "adapter.target_module: unknown key. Did you mean 'target_modules'?",
    "adapter.r=big": "adapter.r: expected an integer, found 'big' (text).",
    "adapter.task_type=SEQ_CLS": "adapter.task_type: unknown key.",
    "adapter={type: sorsa, gamma: -1}": "adapter: SorsaConfig: gamma=-1",
    "patches={tml: {}}": "patches: Unknown patch 'tml'. Did you mean 'tlm'?",
    "patches.tlm.rat=1": "patches: tlm has no setting 'rat'. Did you mean 'rate'?",
    "patches.tlm.rate=2": "patches: tlm: rate=2 is out of range",
    "penalties={l2_ps: 1}": "penalties: Unknown penalty 'l2_ps'. Did you mean 'l2_sp'?",
    "penalties.l2_sp=-1": "penalties: l2_sp: weight=-1 is out of range",
    "ref_modle=x": "ref_modle: unknown key. Did you mean 'ref_model'?",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setattr("hf_reg.runs.run.run_recipe", lambda *_: pytest.fail("something was loaded"))
    found = refused(write(tmp_path, "preference"), "--set", change)
    assert found.startswith(WRONG[change]), found


def test_arguments_need_what_they_refer_to(tmp_path: Path) -> None:
    path = write(tmp_path, "causal-lm")
    said = refused(path, "--set", "data.eval=null", "--set", "train.eval_strategy=epoch")
    assert said == "train.eval_strategy: 'epoch', but there is no data.eval. Give it."
    assert "data.max_tokens: 1 is out of range" in refused(path, "--set", "data.max_tokens=1")
    assert "ref_model: unknown key" in refused(path, "--set", "ref_model=a/b")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    assert refused(path).startswith(f"there is no file {str(path)!r}")
    path.write_text("task: preference\ntrain: [1\n")
    assert refused(path).startswith("line 3: not YAML: expected")
    path.write_text("task: preference\nmodel: a\nmodel: b\n")
    assert refused(path).startswith("line 3: not YAML: the key 'model' is given twice")
    path.write_text("- a list")
    assert refused(path).startswith("expected keys such as task, model, data and train")
    path.write_bytes(b"\xff\xfe\xfa")
    assert refused(path).startswith("cannot be read")


def test_places_of_data(tmp_path: Path) -> None:
    path = write(tmp_path, "causal-lm")
    rows = Dataset.from_list([{"text": "one two"}])
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    (tmp_path / "rows.xlsx").write_text("")
    (tmp_path / "empty").mkdir()
    said = refused(path, "--set", f"data.train={tmp_path}/splits")
    assert "holds several splits. Give data.name" in said
    said = refused(path, "--set", f"data={{name: {tmp_path}/splits, train: train, eval: tests}}")
    assert said == f"data.eval: {tmp_path}/splits has no split 'tests'. Did you mean 'test'? Splits: train, test."
    assert "ends in none of .csv" in refused(path, "--set", f"data.train={tmp_path}/rows.xlsx")
    assert "was not written by Dataset.save_to_disk" in refused(path, "--set", f"data.train={tmp_path}/empty")


@pytest.mark.parametrize(("module", "package"), [("datasets", "datasets"), ("sklearn", "scikit-learn")])
def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setattr("hf_reg.runs.settings.find_spec", lambda name: None if name == module else True)
    said = refused(write(tmp_path, "sequence-classification"))
    assert said.startswith(f"{package} is not installed") and 'pip install "hf_reg[train]"' in said


# ---- what is not loaded, and what is shown


LIGHT = """
import sys
from typer.testing import CliRunner
from hf_reg.cli import app
done = CliRunner().invoke(app, sys.argv[1:])
assert not {"torch", "transformers", "datasets", "peft"} & set(sys.modules), "slow"
print(done.output); sys.exit(done.exit_code)
"""


def test_keys_and_files_are_checked_before_torch_is_imported(tmp_path: Path) -> None:
    path = str(write(tmp_path, "preference"))
    for options, code in ((["--help"], 0), (["train", path, "--set", "modle=x"], 2), (["train", "none.yaml"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", LIGHT, *options], env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr


def test_check_shows_what_would_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_reg.runs.run.run_recipe", lambda *_: pytest.fail("something was loaded"))
    done = train(write(tmp_path, "preference"), "--check", "--set", "adapter.type=balora")
    assert done.exit_code == 0, done.output
    for part in ("mean_b( sum_t log pi(y_w,t) )", "eta = 0.5", "BALoraConfig(r=4", "+ l2_sp", "0.01 * L2SP", "patch",
                 "TLM(", "+ consistency", "+ diversity", "the model with its adapter off", "rate: 0.1"):  # fmt: skip
        assert part in " ".join(done.stdout.split()), part
    assert not (tmp_path / "out").exists()


def test_traceback_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "preference")
    assert isinstance(train(path, "--traceback", "--set", "modle=x").exception, RecipeError)
    monkeypatch.setenv("HF_REG_TRACEBACK", "1")
    assert isinstance(train(path, "--set", "modle=x").exception, RecipeError)


@pytest.mark.parametrize(("recipe", "task"), [("preference", "preference"), ("causal_lm", "causal-lm"),
                                              ("classification", "sequence-classification"),
                                              ("token_classification", "token-classification"),
                                              ("question_answering", "question-answering"),
                                              ("seq2seq", "seq2seq")])  # fmt: skip
def test_the_examples_are_recipes(recipe: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "examples" / "recipes" / f"{recipe}.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    for name in ("train", "eval"):
        for ending in ("jsonl", "txt", "csv"):
            Path(f"{name}.{ending}").write_text(json.dumps({"text": "x"}))
    (tmp_path / "recipe.yaml").write_text(text)
    done: Any = train(tmp_path / "recipe.yaml", "--check")
    assert done.exit_code == 0 and task in done.stdout, done.output
