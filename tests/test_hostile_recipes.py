"""What others may have put into a recipe or where one is expected: a line on stderr, soon, and nothing else."""

from __future__ import annotations

import os
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import yaml
from datasets import Dataset, DatasetDict
from typer.testing import CliRunner

from hf_reg.cli import app
from hf_reg.yaml_text import load_yaml

from .tiny_runs import refused, write


@pytest.fixture(autouse=True)
def nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is loaded, run or written, and no case takes more than seconds."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    monkeypatch.setattr("hf_reg.runs.run.run_recipe", lambda *_: pytest.fail("something was loaded"))
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefghi", "bcdefghij", strict=True)
)
TEXTS = {  # what a recipe says, and what is said of it
    BOMB: "line 5: not YAML: 111,111 values, aliases included; at most 100,000 are read.",
    f"train:\n  {BOMB.replace(chr(10), chr(10) + '  ')}": "line 6: not YAML: 111,111 values, aliases included",
    "task: &a [*a]": "line 1: not YAML: a value holds itself.",
    "&a {task: {model: *a}}": "line 1: not YAML: a value holds itself.",
    "[" * 50_000: "not YAML: more than 100 values inside of each other.",
    "{a: " * 50_000: "not YAML: more than 100 values inside of each other.",
    "task: " + "[" * 200 + "]" * 200: "line 1: not YAML: 101 values inside of each other",
    "task: !!python/object/apply:os.system ['touch RAN']": "the tag '!!python/object/apply:os.system' makes no plain",
    "task: !!python/object/new:os.system ['touch RAN']": "the tag '!!python/object/new:os.system' makes no plain",
    "task: !!python/name:os.system": "the tag '!!python/name:os.system' makes no plain value of this.",
    "task: !!python/module:os": "makes no plain value",
    "task: !!timestamp x": "the tag '!!timestamp' makes no plain value of this.",
    "task: !!binary YQ==": "makes no plain value",
    "task: !!set {a}": "makes no plain value",
    "task: !!str [a]": "the tag '!!str' makes no plain value of this.",
    "task: !!map [a]": "the tag '!!map' makes no plain value of this.",
    "task: !own x": "the tag '!own' makes no plain value of this.",
    "task: !!int abc": "line 1: not YAML: 'abc' is no int.",
    "task: !!bool maybe": "line 1: not YAML: 'maybe' is no bool.",
    "task: !!float x": "line 1: not YAML: 'x' is no float.",
    "task: " + "1" * 5000: "line 1: not YAML: a number of 5,000 digits.",
    "task: a\ntrain: {a: 1, 'a': 2}": "line 2: not YAML: the key 'a' is given twice.",
    "[a]: 1": "line 1: not YAML: a key is a list or a section; expected text.",
    "? {a: 1}\n: 1": "a key is a list or a section; expected text.",
    "{{a}}: b": "a key is a list or a section; expected text.",
    "<<: 3": "line 1: not YAML: expected a mapping or list of mappings for merging",
    "task: a\n---\ntask: b": "line 2: not YAML: but found another document.",
    "task: a\0b": "not YAML: unacceptable character",
    "task: a\x1b[31m": "not YAML: unacceptable character",
    "": "expected keys such as task, model, data and train, found None.",
    "1: x\nnull: y\ntask: causal-lm": "1: unknown key.",
    f"task: {'x' * 500_000}": "task: 'xxxxx",
    "- x\n" * 20_000: "expected keys such as task, model, data and train, found ['x',",
}


@pytest.mark.parametrize("text", TEXTS, ids=[str(index) for index in range(len(TEXTS))])
def test_texts_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("RAN", str(tmp_path / "ran")))
    said = refused(path)
    assert TEXTS[text] in said and len(said) < 400, said


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (lambda path: path.mkdir(), "is no file"),
    "pipe": (lambda path: os.mkfifo(path), "is no file"),
    "link to nowhere": (lambda path: path.symlink_to("nowhere"), "there is no file"),
    "endless file": (lambda path: path.symlink_to("/dev/zero"), "is no file"),
    "UTF-16": (lambda path: path.write_bytes("task: a".encode("utf-16")), "cannot be read: 'utf-8' codec can't"),
    "Latin 1": (lambda path: path.write_bytes("task: ä".encode("latin-1")), "cannot be read: 'utf-8' codec can't"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_file_of_text(tmp_path: Path, kind: str) -> None:
    FILES[kind][0](tmp_path / "recipe.yaml")
    assert FILES[kind][1] in refused(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("size", [1_000_001, 100_000_000, 10**12])
def test_a_recipe_that_is_too_large_is_hardly_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "recipe.yaml"
    path.touch()
    os.truncate(path, size)
    refused(path)  # what it imports is not counted below
    tracemalloc.start()
    began = time.perf_counter()
    said = refused(path)
    took, (_, most) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert said == "it is larger than 1,000,000 bytes, which no recipe is. Give the path of a recipe."
    assert took < 0.5 and most < 5_000_000


NUMBERS = {
    "train.learning_rate=.nan": "train.learning_rate: nan is no finite number.",
    "train.learning_rate=1e400": "train.learning_rate: inf is no finite number",
    "train.num_train_epochs=-.inf": "train.num_train_epochs: -inf is no finite number",
    "train.max_steps=9999999999999999999": "train.max_steps: 9999999999999999999 is beyond the integers of 64",
    "train.lr_scheduler_kwargs={a: [1, .nan]}": "train.lr_scheduler_kwargs.a[1]: nan is no finite number",
    "adapter.lora_dropout=.nan": "adapter.lora_dropout: nan is no finite number",
    "patches.tlm.rate=.nan": "patches.tlm.rate: nan is no finite number",
    "penalties.l2_sp=-.inf": "penalties.l2_sp: -inf is no finite number",
    f"penalties.l2_sp={'9' * 90}": "penalties.l2_sp: 999",
    f"penalties.l2_sp={'9' * 400}": "the value is not YAML (a number of 400 digits).",
    "train.seed=!!python/name:os.system": "the value is not YAML (the tag '!!python/name:os.system' makes no plain",
    "patches={tlm: 0.1}": "patches: tlm: expected a dict of settings, got 0.1.",
    "data.columns={text: 1}": "data.columns: expected a section of keys, each with text, found {'text': 1}",
}


@pytest.mark.parametrize("change", NUMBERS)
def test_values_that_nothing_can_be_set_to(tmp_path: Path, change: str) -> None:
    said = refused(write(tmp_path, "causal-lm"), "--set", change)
    assert NUMBERS[change] in said and len(said) < 400, said


def test_aliases_of_a_usual_size_are_read() -> None:
    assert load_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {x: 1}, y: 2}") == {"a": [1, 2], "b": [1, 2], "c": {"x": 1, "y": 2}}
    assert load_yaml("[]") == [] and load_yaml("") is None
    with pytest.raises(yaml.YAMLError, match="aliases included"):
        load_yaml(BOMB)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"splits": 3}', '{"splits": [1]}', '{"splits":' + "[" * 10_000]
)
def test_folders_of_splits(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "causal-lm")
    rows = Dataset.from_list([{"text": "one two"}])
    DatasetDict(train=rows).save_to_disk(tmp_path / "splits")
    (tmp_path / "splits" / "dataset_dict.json").write_text(text)
    said = refused(path, "--set", f"data={{name: {tmp_path}/splits, train: train}}")
    assert said.startswith("data.name: ") and ("is no JSON file" in said or "splits" in said or "holds a list" in said)


@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_other_commands_hardly_read_what_is_too_large(tmp_path: Path, command: str) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 100_000_000)
    options = {"inspect": [], "merge": [str(tmp_path / "merged")]}[command]
    CliRunner().invoke(app, [command, str(tmp_path), *options])  # what it imports
    began = time.perf_counter()
    done = CliRunner().invoke(app, [command, str(tmp_path), *options])
    assert done.exit_code == 1 and time.perf_counter() - began < 1
    assert (
        "has 100,000,000 bytes; such a file has at most 10,000,000." in done.stderr and "Traceback" not in done.output
    )


HOSTILE_CONFIGURATIONS = {
    "deep": '{"model_type": "bert", "a":' + "[" * 100_000,
    "deep and closed": '{"model_type": "bert", "a":' + "[" * 900 + "]" * 900 + "}",
    "kinds": '{"model_type": "bert", "hidden_size": "x"}',
    "negative": '{"model_type": "bert", "num_hidden_layers": 2, "hidden_size": -3}',
    "list": "[]",
    "kind of model": '{"model_type": ["bert"]}',
}


@pytest.mark.parametrize("kind", HOSTILE_CONFIGURATIONS)
def test_configurations_that_cannot_be_inspected(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(HOSTILE_CONFIGURATIONS[kind])
    done = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    assert done.stderr.count("hf-reg inspect") == 1 and not done.stdout


def test_sizes_without_end_are_inspected_without_memory(tmp_path: Path) -> None:
    sizes = '"hidden_size": 1000000000, "num_attention_heads": 1, "num_hidden_layers": 2'
    (tmp_path / "config.json").write_text(f'{{"model_type": "bert", {sizes}}}')
    done = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert done.exit_code == 0, done.output
