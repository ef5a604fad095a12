"""`accelerate launch -m hf_reg.cli train RECIPE` on two processes: files once, and the metrics of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ..test_recipe_metrics import INT, SQUAD, TEXT, script
from ..tiny_runs import ROWS, arguments, train, write
from .launch import run


pytestmark = pytest.mark.distributed
LAUNCH = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port",
    "0", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "tests.distributed.process", "hf_reg.cli",
]  # fmt: skip
KINDS = {  # of the metric that notes what it is given
    "sequence-classification": (TEXT, TEXT),
    "token-classification": (f"Sequence({TEXT})", f"Sequence({TEXT})"),
    "question-answering": (f'{{"id": {TEXT}, "prediction_text": {TEXT}}}', SQUAD),
    "seq2seq": (TEXT, TEXT),
}

TASKS = ["token-classification", "sequence-classification", "question-answering", "seq2seq", "preference", "causal-lm"]


def started(folder: Path, recipe: Path, *options: str) -> str:
    """Standard output of a run that must succeed, with caches of its own; one process shows bars and reports."""
    settings = {"HF_HOME": str(folder / "home"), "ACCELERATE_USE_CPU": "true"}
    done = run([*LAUNCH, "train", str(recipe), *options], **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    loads = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("Loading weights: 100%")]
    assert len(loads) == 1 and done.stderr.count("LOAD REPORT") <= 1, done.stderr[-4000:]
    return done.stdout


def metrics(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "all_results.json").read_text())
    return {key: found[key] for key in found if "runtime" not in key and "per_second" not in key}


def prepared(tmp_path: Path, task: str) -> tuple[Path, list[str], Path]:
    """A recipe with checkpoints and a metric that notes what it is given, options for other held-out rows, `out`."""
    own: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    own |= {"per_device_train_batch_size": 2, "disable_tqdm": False}
    own |= {"per_device_eval_batch_size": 1}  # the loss of a last batch that is filled up with other rows is another
    if task == "seq2seq":
        own |= {"predict_with_generate": True, "generation_max_length": 8}
    further = {}
    if task in KINDS:
        further = {"metrics": [script(tmp_path, "noted", *KINDS[task], '{"rows": len(predictions)}')]}
    recipe = write(tmp_path, task, train=arguments(tmp_path, task, **own), **further)
    rows = ROWS[task][:-1]  # one process has a row more than the other
    if task == "causal-lm":  # whose loss Trainer weighs by the tokens of all processes at a step, not of one
        rows = [{"text": "one two"}, {"text": "two one"}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe, ["--set", f"data.eval={tmp_path}/eval.jsonl"], tmp_path / "out"


@pytest.mark.parametrize("task", [TASKS[0], *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[1:])])
def test_a_recipe_on_two_processes(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    recipe, evaluated, out = prepared(tmp_path, task)
    said = started(tmp_path, recipe, *evaluated)
    assert said.count("eval_loss ") == said.count("parameters are trained") == said.count("The model is in") == 1
    found = metrics(out)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not list(tmp_path.rglob("*.partial")) and not list(out.rglob("_saving-*"))
    assert not list((tmp_path / "home").glob("metrics/**/*.arrow*")), "a process kept predictions in a file"
    assert sorted(path.name for path in out.rglob("rng_*")) == ["rng_state_0.pth"] * 2 + ["rng_state_1.pth"] * 2
    if task in KINDS:
        lines = (tmp_path / "seen.jsonl").read_text().splitlines()
        trials, rounds = lines[:2], lines[2:]
        assert trials[0] == trials[1] and len(rounds) == 2 * 3  # both processes, at steps 2 and 4 and at the end
        assert [len(json.loads(line)[0]) for line in rounds] == [len(ROWS[task]) - 1] * 6
        assert rounds[-1] == rounds[-2] and found["eval_noted/rows"] == len(ROWS[task]) - 1

    one = [f"train.resume={out}/checkpoint-4", f"train.output_dir={tmp_path}/one"]
    alone = [*evaluated, *(part for change in one for part in ("--set", change))]
    done = train(recipe, *alone)
    assert done.exit_code == 0, done.output
    again = metrics(tmp_path / "one")
    for key, value in found.items():
        if key.startswith("eval_"):
            assert again[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_go_on(tmp_path: Path, task: str) -> None:
    recipe, evaluated, out = prepared(tmp_path, task)
    started(tmp_path, recipe, *evaluated)
    found = metrics(out)
    weights = load_file(next(out.glob("*model.safetensors")))
    shutil.rmtree(out / "checkpoint-4")
    said = started(tmp_path, recipe, *evaluated, "--resume")
    assert said.count("going on from") == 1 and metrics(out).keys() == found.keys()
    resumed = load_file(next(out.glob("*model.safetensors")))
    assert all(weights[name].equal(resumed[name]) for name in weights)
    for key, value in found.items():
        if key.startswith("eval_"):
            assert metrics(out)[key] == pytest.approx(value, rel=1e-6), key
    AutoTokenizer.from_pretrained(out)


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tmp_path: Path) -> None:
    recipe = write(tmp_path, "token-classification", metrics=[script(tmp_path, "fails", INT, INT, "1 / 0")])
    done = run([*LAUNCH, "train", str(recipe)], HF_HOME=str(tmp_path / "home"), ACCELERATE_USE_CPU="true")
    lines = [line for line in done.stderr.splitlines() if line.startswith("hf-reg train")]
    assert done.returncode and all("metrics: fails: division by zero" in line for line in lines) and lines
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    done = run([*LAUNCH, "train", str(recipe), "--set", "modle=x"], ACCELERATE_USE_CPU="true")
    assert done.stderr.count("modle: unknown key. Did you mean 'model'?") == 1 and done.returncode
