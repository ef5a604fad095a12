"""`hf-reg train` with a model and a data set of the Hub: pinned, then offline, and what is said where it fails."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..distributed.launch import run
from ..tiny_runs import ROWS, arguments, model_of, trained, write
from .conftest import READER, TOKEN
from .server import HubServer, Repository


TASK = "sequence-classification"


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def offered(hub: HubServer, folder: Path) -> tuple[str, str]:
    """`alice/base` and the data set `alice/rows`, both changed since; the revisions that a recipe pins."""
    write(folder, TASK)
    files = {path.name: path.read_bytes() for path in (folder / "base").iterdir()}
    rows = ROWS[TASK]
    hub.repositories["alice/base"] = base = Repository("alice")
    hub.repositories["datasets/alice/rows"] = data = Repository("alice")
    pinned = base.commit("main", files), data.commit("main", {"train.jsonl": lines(rows), "test.jsonl": lines(rows)})
    other = model_of(TASK)
    other.embeddings.word_embeddings.weight.data.mul_(3)
    other.save_pretrained(folder / "other")
    base.commit("main", files | {"model.safetensors": (folder / "other" / "model.safetensors").read_bytes()})
    data.commit("main", {"train.jsonl": lines(rows[:3]), "test.jsonl": lines(rows[:2])})
    return pinned


def recipe(folder: Path, name: str, model: Any, data: dict[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    train = arguments(folder, TASK, output_dir=str(folder / name))
    given = {"task": TASK, "model": model, "data": {"max_tokens": 32, **data}, "train": train}
    adapter = {"type": "lora", "r": 4, "target_modules": "all-linear"}
    path.write_text(
        yaml.safe_dump({**given, "adapter": adapter, "patches": {"tlm": {}}, "penalties": {"l2_sp": 0.01}})
    )
    return path


def start(path: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return run(["hf_reg.cli", "train", str(path), *options], **settings)


def scores(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "all_results.json").read_text())
    return {key: found[key] for key in ("eval_loss", "eval_accuracy", "train_loss")}


ROWS_OF = {"name": "alice/rows", "train": "train", "eval": "test"}


def test_a_model_and_a_data_set_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    model, data = offered(hub, tmp_path)
    given = hub.environment(tmp_path / "home", TOKEN)
    path = recipe(tmp_path, "pinned", {"name": "alice/base", "revision": model}, {**ROWS_OF, "revision": data})
    done = start(path, **given)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "train 8 rows, eval 8 rows" in done.stdout
    local = recipe(
        tmp_path, "out", str(tmp_path / "base"), {key: str(tmp_path / "rows.jsonl") for key in ("train", "eval")}
    )
    trained(local)
    assert scores(tmp_path / "pinned") == pytest.approx(scores(tmp_path / "out"), rel=1e-5)
    hub.requests.clear()
    again = start(path, "--set", f"train.output_dir={tmp_path}/offline", **{**given, "HF_HUB_OFFLINE": "1"})
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-3000:]
    assert not hub.requests and scores(tmp_path / "offline") == scores(tmp_path / "pinned")
    newest = start(recipe(tmp_path, "newest", "alice/base", ROWS_OF), **given)
    assert newest.returncode == 0 and "train 3 rows, eval 2 rows" in newest.stdout, newest.stderr[-3000:]


NO_DATA = "cannot be loaded: Dataset 'alice/nothing' doesn't exist on the Hub"
OUT_OF_REACH = "cannot be loaded: Couldn't reach 'alice/rows' on the Hub"
FAILURES: dict[
    str, tuple[str | None, dict[str, Any], dict[str, str], str]
] = {  # model, data, environment, what is said
    "no data set": (None, {"name": "alice/nothing"}, {}, f"data.train (alice/nothing, split train) {NO_DATA}"),
    "no split": (None, {"eval": "dev"}, {}, """(alice/rows, split dev) cannot be loaded: Unknown split "dev"."""),
    "no revision": (None, {"revision": "v9"}, {}, "cannot be loaded: Revision 'v9' doesn't exist for dataset"),
    "gated data": (
        None,
        {"name": "alice/gated"},
        {"HF_TOKEN": READER},
        "'alice/gated' is a gated dataset on the Hub.",
    ),
    "private data": (None, {"name": "alice/private"}, {"HF_TOKEN": READER}, "doesn't exist on the Hub or cannot be"),
    "no model": ("alice/nothing", {}, {}, "the tokenizer of alice/nothing cannot be loaded: alice/nothing is not a"),
    "gated model": (
        "alice/gated",
        {},
        {"HF_TOKEN": READER},
        "alice/gated cannot be loaded: You are trying to access a",
    ),
    "no network": (
        None,
        {},
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        f"data.train (alice/rows, split train) {OUT_OF_REACH}",
    ),
    "offline": (None, {}, {"HF_HUB_OFFLINE": "1"}, f"data.train (alice/rows, split train) {OUT_OF_REACH}"),
}
SAMPLE = ["gated data"]  # the others are slow: a process each


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one in SAMPLE else pytest.mark.slow) for one in FAILURES]
)
def test_what_the_hub_refuses_is_said_in_a_line(hub: HubServer, tmp_path: Path, name: str) -> None:
    offered(hub, tmp_path)
    for place in ("alice/gated", "datasets/alice/gated"):
        hub.repositories[place] = Repository("alice", gated=True)
        hub.repositories[place].commit("main", {"config.json": b"{}", "train.jsonl": b'{"text": "a", "label": 0}'})
    hub.repositories["datasets/alice/private"] = Repository("alice", private=True)
    model, data, settings, text = FAILURES[name]
    path = recipe(tmp_path, "refused", model or str(tmp_path / "base"), {**ROWS_OF, **data})
    done = start(path, **{**hub.environment(tmp_path / "home", TOKEN), **settings})
    said = [line for line in done.stderr.splitlines() if line.startswith("hf-reg train")]
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr[-3000:]
    assert len(said) == 1 and text in said[0] and len(said[0]) < 600
    assert not (tmp_path / "refused" / "recipe.yaml").exists()
