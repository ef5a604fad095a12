"""`hf-reg train` makes the run that its recipe describes: the one that a script would make by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    set_seed,
)

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, RPOConfig, RPOTrainer
from hf_reg.yaml_text import load_yaml

from .distributed.launch import launch
from .tiny_runs import LABELS, ROWS, TASKS, TEXTS, arguments, llama, refused, train, trained, write


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def by_hand(folder: Path, task: str, adapter: bool = True) -> tuple[dict[str, float], Any]:
    """The recipe of `write` as a script."""
    set_seed(42)
    settings = arguments(folder, task) | {"output_dir": str(folder / "by_hand")}
    tokenizer, rows, labels = AutoTokenizer.from_pretrained(folder / "base"), ROWS[task], sorted(set(LABELS))
    more: dict[str, Any] = {}
    cls: Any
    if task == "preference":
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
        args, cls, kind = RPOConfig(**settings), RPOTrainer, "CAUSAL_LM"
    else:
        ids = tokenizer(TEXTS)["input_ids"]
        args, cls = RegularizedTrainingArguments(**settings), RegularizedTrainer
        if task == "causal-lm":
            model, kind = AutoModelForCausalLM.from_pretrained(folder / "base"), "CAUSAL_LM"
            rows, more = [{"input_ids": one, "labels": one} for one in ids], {"data_collator": DataCollatorForSeq2Seq}
        else:
            model, kind = AutoModelForSequenceClassification.from_pretrained(folder / "base"), "SEQ_CLS"
            rows = [{"input_ids": one, "labels": labels.index(n)} for one, n in zip(ids, LABELS, strict=True)]
            more = {"data_collator": DataCollatorWithPadding}
        more = {name: collator(tokenizer) for name, collator in more.items()}
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type=kind))
    made = cls(
        model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, patches={"tlm": {"rate": 0.1}},
        penalties={"l2_sp": 0.01}, **more,
    )  # fmt: skip
    metrics = made.train().metrics
    made.save_model()
    return metrics | made.evaluate(), made


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_is_the_run_by_hand(tmp_path: Path, task: str) -> None:
    found = trained(write(tmp_path, task))
    expected, made = by_hand(tmp_path, task)
    for key, value in expected.items():
        if "runtime" not in key and "per_second" not in key:
            assert found[key] == pytest.approx(value, rel=1e-6), key
    hand = weights(tmp_path / "by_hand")
    saved = weights(tmp_path / "out")
    assert saved.keys() == hand.keys()
    assert all(torch.equal(saved[name], hand[name]) for name in hand)
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)
    assert load_yaml((tmp_path / "out" / "recipe.yaml").read_text())["penalties"] == {"l2_sp": 0.01}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_whole_model_is_trained_in_single_precision(tmp_path: Path) -> None:
    write(tmp_path, "causal-lm")
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    path = write(tmp_path, "causal-lm", adapter="none", patches=None, penalties=None)
    found = trained(path)
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.float32}
    assert found["eval_perplexity"] == pytest.approx(2.718281828 ** found["eval_loss"])
    half = ["--set", "model.dtype=auto", "--set", f"train.output_dir={tmp_path}/half"]
    assert train(path, *half).exit_code == 0
    assert {value.dtype for value in weights(tmp_path / "half").values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["sorsa", "balora"])
@pytest.mark.parametrize("task", TASKS)
def test_svd_adapters_are_saved_as_plain_lora(tmp_path: Path, task: str, kind: str) -> None:
    found = trained(write(tmp_path, task, adapter={"type": kind, "r": 4}, patches=None))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
    assert ("eval_loss_consistency" in found) == (kind == "balora")


def test_a_reference_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, "preference", adapter=None, patches=None, penalties=None, ref_model=str(tmp_path / "base"))
    assert trained(path, "--set", "train.learning_rate=0")["eval_rewards/margins"] == 0
    assert "no reference is left of it. Give ref_model" in refused(path, "--set", "ref_model=null", code=1)


# ---- stopped and gone on with


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path, "preference", train=arguments(tmp_path, "preference", save_strategy="steps", save_steps=2))
    whole = trained(path)
    assert "is left of an earlier run. Go on from it with --resume" in refused(path)
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").unlink()  # killed while it was written
    steps: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        step = RPOTrainer.training_step
        patched.setattr(RPOTrainer, "training_step", lambda *given: (steps.append(1), step(*given))[1])
        done = train(path, "--resume")
    assert len(steps) == 2
    assert done.exit_code == 0 and f"going on from {tmp_path}/out/checkpoint-2" in "".join(done.stdout.splitlines())
    again = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    assert "resume" not in load_yaml((tmp_path / "out" / "recipe.yaml").read_text())["train"]
    done = train(path, "--set", f"train.resume={tmp_path}/out/checkpoint-2")
    assert done.exit_code == 0 and "checkpoint-2" in done.stdout


def test_without_a_checkpoint_it_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, "causal-lm")
    for options in (["--resume"], ["--set", "train.resume=true"]):
        said = refused(path, *options)
        assert said == f"train.resume: there is no checkpoint in '{tmp_path}/out'. Leave resume out to start anew."


def test_an_elastic_restart_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "causal-lm", train=arguments(tmp_path, "causal-lm", save_strategy="steps", save_steps=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "going on" not in train(path).stdout  # it failed before the first checkpoint
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert "checkpoint-2" in train(path).stdout


# ---- data


def trainer_of(recipe: Path) -> Any:
    """The trainer that a recipe makes, before it begins."""
    made: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hf_reg.trainer.RegularizerMixin.train", lambda self, **_: made.append(self) or 1 / 0)
        assert isinstance(train(recipe).exception, ZeroDivisionError)  # a mistake of the program keeps its traceback
    return made[0]


def test_pairs_of_texts(tmp_path: Path) -> None:
    path = write(tmp_path, "sequence-classification")
    rows = [{"text": "one", "text_pair": "two", "label": label} for label in "ab"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = AutoTokenizer.from_pretrained(tmp_path / "base")("one", "two")["input_ids"]
    found = trainer_of(path).train_dataset
    assert list(found["input_ids"]) == [expected, expected] and list(found["labels"]) == [0, 1]


def test_labels_and_their_names(tmp_path: Path) -> None:
    path = write(tmp_path, "sequence-classification")
    found = trained(path)
    config = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2), tmp_path / "out"
    )
    assert config.num_labels == 2 and 0 <= found["eval_macro_f1"] <= 1 and 0 <= found["eval_accuracy"] <= 1
    whole = ["--set", "adapter=none", "--set", f"train.output_dir={tmp_path}/whole"]
    assert train(path, *whole).exit_code == 0
    saved = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert saved["id2label"] == {"0": "air", "1": "toy"} and saved["label2id"] == {"air": 0, "toy": 1}
    # a head that knows these classes in another order keeps it
    saved |= {"id2label": {"0": "toy", "1": "air"}, "label2id": {"toy": 0, "air": 1}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(saved))
    again = ["--set", "adapter=none", "--set", f"model={tmp_path}/whole", "--set", f"train.output_dir={tmp_path}/3"]
    assert train(path, *again, "--set", "train.learning_rate=0").exit_code == 0
    assert json.loads((tmp_path / "3" / "config.json").read_text())["label2id"] == {"toy": 0, "air": 1}
    before, after = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("whole", "3"))
    assert after["eval_accuracy"] == pytest.approx(1 - before["eval_accuracy"])


def test_the_scores_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.metrics import f1_score

    from hf_reg.runs.metrics import Outputs, class_scores

    found = class_scores(Outputs([0, 1, 1, 2], [0, 1, 2, 2], ["a", "b", "c"]))
    macro = f1_score([0, 1, 2, 2], [0, 1, 1, 2], average="macro")
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx(macro)}


SENTENCES = [{"words": text, "kind": i % 3} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("form", ["csv", "json", "parquet", "saved", "splits"])
def test_every_form_of_data(tmp_path: Path, form: str) -> None:
    kinds = ClassLabel(names=["z", "b", "a"]) if form == "saved" else Value("int64")
    rows = Dataset.from_list([{**row, "label": 9} for row in SENTENCES])  # whose own label is not the one
    rows = rows.cast(Features(words=Value("string"), kind=kinds, label=Value("int64")))
    place: dict[str, Any] = {"train": str(tmp_path / f"data.{form}")}
    columns = {"text": "words", "label": "kind"}
    if form in ("csv", "json", "parquet"):
        getattr(rows, f"to_{form}")(place["train"])
    elif form == "saved":
        rows.save_to_disk(place["train"])
    else:
        DatasetDict(one=rows, two=rows).save_to_disk(tmp_path / "splits")
        place = {"name": str(tmp_path / "splits"), "train": "one", "eval": "two"}
    place |= {"eval": place["train"]} if "eval" not in place else {}
    path = write(tmp_path, "sequence-classification", data={**place, "columns": columns}, adapter=None)
    trained(path, "--set", "data.max_tokens=64", "--set", "train.max_steps=1")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(saved["id2label"].values()) == (["z", "b", "a"] if form == "saved" else ["0", "1", "2"])


def test_blank_lines_and_single_tokens_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one two\n\n   \nthree four\n")
    path = write(tmp_path, "causal-lm", data={"train": str(tmp_path / "lines.txt"), "max_tokens": 32})
    made, tokenizer = trainer_of(path), AutoTokenizer.from_pretrained(tmp_path / "base")
    rows = made.train_dataset
    assert list(rows["input_ids"]) == tokenizer(["one two", "three four"])["input_ids"]
    assert list(rows["labels"]) == list(rows["input_ids"])
    batch = made.data_collator([rows[0], rows[1]])
    assert (batch["labels"] == -100).sum() == (batch["attention_mask"] == 0).sum() == 3


RUN_ERRORS = {
    "preference": {
        "data.columns={chosen: nothing}": "data.columns names 'nothing'; found prompt, chosen, rejected.",
        "model=none/such": "the tokenizer of none/such cannot be loaded: ",
        "data={name: none/such, train: train}": "data.train (none/such, split train) cannot be loaded: ",
        "adapter.target_modules=[nothing]": "the adapter cannot be added: ",
        "ref_model=none/such": "model none/such cannot be loaded: ",
        "train.max_length=4": "the run cannot start: train_dataset",
    },
    "causal-lm": {
        "data.columns={text: nothing}": "data.columns names 'nothing'",
        "data.max_tokens=4000": "data.max_tokens: 4000 tokens are more than the model takes. Give 128 or fewer.",
    },
    "sequence-classification": {
        "data.columns={text: label}": "data.train (PLACE) has no column 'label'; found text.",
        "data.eval=ODD": "data.eval has the label 'odd', which data.train has not. Labels: air, toy.",
        "data.train=ODD": "data.train: the column 'label' holds one class, 'odd'",
        "data.train=NULL": "data.train: row 1 has no label.",
        "data.train=FLOAT": "data.train: the column 'label' holds float64; expected texts or integers",
        "data.train=BLANK": "data.train: all 2 rows have a blank text.",
        "data.train=EMPTY": "data.train (",
        "data.train=BROKEN": "data.train (",
    },
}
FILES = {
    "ODD": [{"text": "a", "label": "odd"}] * 2,
    "NULL": [{"text": "a", "label": "odd"}, {"text": "a", "label": None}],
    "FLOAT": [{"text": "a", "label": 0.5}],
    "BLANK": [{"text": " ", "label": "a"}, {"text": "", "label": "b"}],
    "EMPTY": [],
}


@pytest.mark.parametrize(("task", "change"), [(task, change) for task in TASKS for change in RUN_ERRORS[task]])
def test_what_cannot_be_run_is_said_in_a_line(tmp_path: Path, task: str, change: str) -> None:
    for name, rows in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "BROKEN.jsonl").write_text("{no json")
    key, _, value = change.partition("=")
    named = value if not value.isupper() else str(tmp_path / f"{value}.jsonl")
    said = refused(write(tmp_path, task), "--set", f"{key}={named}", code=1)
    assert RUN_ERRORS[task][change].replace("PLACE", f"{tmp_path}/rows.jsonl") in said, said


def test_a_training_that_stops(tmp_path: Path) -> None:
    said = refused(write(tmp_path, "causal-lm"), "--set", "train.learning_rate=1e20", code=1)
    assert said.startswith("training stopped: Step 2: not finite: the loss term")


# ---- processes, examples


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    path = write(tmp_path, "preference", patches=None)
    whole = trained(path)
    shutil.rmtree(tmp_path / "out")
    options = ["--set", "train.per_device_train_batch_size=4"]
    launch("hf_reg.cli", "train", str(path), *options, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    found = json.loads((tmp_path / "out" / "all_results.json").read_text())
    for key in ("eval_loss", "train_loss", "eval_rewards/margins"):
        assert found[key] == pytest.approx(whole[key], rel=1e-4), key


@pytest.mark.parametrize(("name", "task"), [("preference", "preference"), ("causal_lm", "causal-lm"),
                                            ("classification", "sequence-classification")])  # fmt: skip
def test_the_examples_run(tmp_path: Path, name: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, task)
    example = Path(__file__).parents[1] / "examples" / "recipes" / f"{name}.yaml"
    tiny = [f"model={tmp_path}/base", f"data.train={tmp_path}/rows.jsonl", f"data.eval={tmp_path}/rows.jsonl"]
    tiny += [f"train.output_dir={tmp_path}/out", "train.max_steps=2", "train.use_cpu=true", "train.report_to=none"]
    tiny += ["adapter.r=4"] if name != "classification" else []
    tiny += ["data.max_tokens=48"] if name != "preference" else ["train.max_length=64"]
    done = train(example, *(part for change in tiny for part in ("--set", change)))
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "eval_loss" in done.stdout and (tmp_path / "out" / "recipe.yaml").is_file()
