"""`--smoke`: recipes go through on what stands for model and data; and prompts of causal language models."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hf_reg.cli import app
from hf_reg.runs.recipe import make_recipe, read_tree
from hf_reg.runs.settings import make_settings
from hf_reg.runs.smoke import SMOKE, smoke_run, smoke_tree
from hf_reg.runs.stand_ins import rows_of

from .tiny_runs import refused, train, write


RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))
SLOW = ("compare", "evidence")
SAMPLE = [pytest.param(path, marks=pytest.mark.slow if path.stem.startswith(SLOW) else ()) for path in RECIPES]


def told(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("recipe", SAMPLE, ids=lambda path: path.stem)
def test_every_recipe_goes_through(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # none of what it names is here
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command = "compare" if "compare" in yaml.safe_load(recipe.read_text()) else "train"
    done = CliRunner().invoke(app, [command, str(recipe), "--smoke"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert told(SMOKE) in told(done.stdout) and "loss" in done.stdout
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("hf-reg-smoke") or "out" in path.name]


def test_all_else_is_as_the_recipe_says(tmp_path: Path) -> None:
    path = next(one for one in RECIPES if one.stem == "metamath_balora")
    said, made = read_tree(path), smoke_tree(read_tree(path), tmp_path)
    assert made["adapter"] == said["adapter"] and made["task"] == said["task"]
    changed = {key for key in said["train"] if made["train"].get(key) != said["train"][key]}
    assert {"output_dir"} <= changed <= {"output_dir", "bf16"}
    assert {key for key in made["train"] if key not in said["train"]} == {"max_steps", "report_to", "disable_tqdm"}
    assert made["model"]["dtype"] == "bfloat16" and made["model"]["name"] == str(tmp_path / "model")
    assert set(said["data"]) - set(made["data"]) == {"name"}
    assert made["data"]["template"] == said["data"]["template"]


def test_ranks_fit_into_the_model(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"task": "causal-lm", "model": "x/y", "adapter": {"type": "sorsa", "r": 100}}
    tree |= {"data": {"train": "absent.txt", "max_tokens": 700}, "train": {"output_dir": "out", "use_cpu": True}}
    with smoke_run(tree) as smoke:
        recipe = make_recipe(smoke)
        from hf_reg.runs.data import load_data

        trainer = recipe.make_trainer(make_settings(recipe), load_data(recipe.data, recipe.COLUMNS))
        assert trainer.model.config.hidden_size == 128
        assert trainer.model.config.max_position_embeddings >= 700
    assert not Path(smoke["train"]["output_dir"]).exists()


@pytest.mark.parametrize(("name", "cls"), [("microsoft/deberta-v3-base", "DebertaV2"), ("bert-base-cased", "Bert"),
                                           ("meta-llama/Llama-3.2-1B", "Llama"), ("a/b", "Bert")])  # fmt: skip
def test_the_architecture_is_that_of_the_name(name: str, cls: str, tmp_path: Path) -> None:
    tree = {"task": "sequence-classification", "model": {"name": name, "revision": "v1"}, "data": {"train": "x.csv"}}
    made = smoke_tree({**tree, "train": {"output_dir": "out"}}, tmp_path)
    from transformers import AutoConfig

    assert type(AutoConfig.from_pretrained(made["model"]["name"])).__name__ == f"{cls}Config"
    assert "revision" not in made["model"]


@pytest.mark.parametrize(("change", "part"), [("modle=x", "modle: unknown key"), ("task=x", "task: 'x'"),
                                              ("patches.tlm.rat=1", "no setting 'rat'"),
                                              ("data.columns.txt=x", "data.columns.txt: unknown key"),
                                              ("data.column=x", "data.column: unknown key"),
                                              ("train.lr=1", "train.lr: unknown key"), ("train=3", "train"),
                                              ("data.columns=3", "data.columns: expected a section")])  # fmt: skip
def test_what_is_wrong_stays_wrong(tmp_path: Path, change: str, part: str) -> None:
    assert part in refused(write(tmp_path, "sequence-classification"), "--smoke", "--set", change)


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert "--smoke and --resume" in refused(write(tmp_path, "causal-lm"), "--smoke", "--resume")
    done = train(write(tmp_path, "causal-lm"), "--smoke", "--check")
    assert done.exit_code == 0 and told(SMOKE) in told(done.stdout) and "LoraConfig" in done.stdout


@pytest.mark.parametrize("task", ["preference", "seq2seq", "question-answering", "token-classification"])
def test_rows_have_the_columns(task: str) -> None:
    from hf_reg.runs.tasks import TASKS

    assert set(TASKS[task].COLUMNS) <= set(rows_of(task, [])[0])


def encoded(folder: Path, rows: str, **data: Any) -> Any:
    """The examples of a causal-lm recipe, and the tokenizer."""
    path = write(folder, "causal-lm")
    (folder / "rows.jsonl").write_text(rows)
    tree = read_tree(path)
    tree["data"] = {"train": str(folder / "rows.jsonl"), "max_tokens": 32, **data}
    recipe = make_recipe(tree)
    from hf_reg.runs.data import load_data

    trainer = recipe.make_trainer(make_settings(recipe), load_data(recipe.data, recipe.COLUMNS))
    return trainer.train_dataset, trainer.processing_class


def test_prompts_are_read_and_not_learned(tmp_path: Path) -> None:
    rows = '{"q": "why", "text": "so"}\n{"q": "a very long question that leaves no room", "text": "yes"}\n'
    found, tokenizer = encoded(
        tmp_path, rows, columns={"prompt": "q"}, template="ask {prompt} say", end=True, max_tokens=20
    )
    ids, labels = found[0]["input_ids"], found[0]["labels"]
    assert len(found) == 1  # of the other one nothing is left to learn
    assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ") == "<bos>ask why sayso<eos>"
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id and ids.count(1) == 1
    assert labels == [-100] * (1 + len("ask why say")) + ids[-3:]


def test_a_prompt_that_the_recipe_does_not_name_is_no_prompt(tmp_path: Path) -> None:
    found, tokenizer = encoded(tmp_path, '{"prompt": "why", "text": "so"}\n')
    assert found[0]["input_ids"] == found[0]["labels"] == tokenizer("so")["input_ids"]


@pytest.mark.parametrize(
    ("change", "part", "code"),
    [
        ("data.template=no place", "data.template", 2),
        ("data.template='{prompt}'", "no column 'prompt'", 1),
        ("data.columns.prompt=q", "data.columns names 'q'", 1),
    ],
)
def test_wrong_prompts(tmp_path: Path, change: str, part: str, code: int) -> None:
    assert part in refused(write(tmp_path, "causal-lm"), "--set", change, code=code)
