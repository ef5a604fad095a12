"""The tasks token-classification, question-answering and seq2seq: each recipe is the run that a script would make."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments
from hf_reg.runs.answers import exact_match, f1
from hf_reg.runs.models import word_prefix

from .tiny_runs import ANSWERS, CONTEXTS, ROWS, TEXTS, arguments, refused, train, trained, write


NEW = ["token-classification", "question-answering", "seq2seq"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield


def rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- by hand: in the tokenizer of these tests every character is a token


def tagged(tokenizer: Any) -> tuple[list[dict[str, Any]], Any, str, Any]:
    rows = []
    for row in ROWS["token-classification"]:
        ids, labels = [tokenizer.bos_token_id], [-100]
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            ids += tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            labels += [["long", "short"].index(tag)] + [-100] * len(word)
        rows.append({"input_ids": ids, "labels": labels})
    return rows, AutoModelForTokenClassification, "TOKEN_CLS", DataCollatorForTokenClassification(tokenizer)


def cut() -> Iterator[tuple[int, int, str]]:
    """Example, first character and text of every cut: 32 tokens with <bos> question <eos>, 6 of them shared."""
    for index, (context, (question, _)) in enumerate(zip(CONTEXTS, ANSWERS, strict=True)):
        room, first = 32 - 2 - len(question), 0
        while True:
            yield index, first, context[first : first + room]
            if first + room >= len(context):
                break
            first += room - 6


def asked(tokenizer: Any) -> tuple[list[dict[str, Any]], Any, str, Any]:
    rows = []
    for index, first, part in cut():
        question, answer = ANSWERS[index]
        ids = tokenizer(question)["input_ids"] + [tokenizer.eos_token_id]
        before, begin = len(ids), CONTEXTS[index].index(answer) - first
        ids += tokenizer(part, add_special_tokens=False)["input_ids"]
        whole = begin >= 0 and begin + len(answer) <= len(part)
        rows.append({
            "input_ids": ids, "token_type_ids": [0] * before + [1] * len(part),
            "start_positions": before + begin if whole else 0,
            "end_positions": before + begin + len(answer) - 1 if whole else 0,
        })  # fmt: skip
    return rows, AutoModelForQuestionAnswering, "QUESTION_ANS", DataCollatorWithPadding(tokenizer)


def reversed_texts(tokenizer: Any) -> tuple[list[dict[str, Any]], Any, str, Any]:
    rows = [{"input_ids": tokenizer(t)["input_ids"], "labels": tokenizer(t[::-1])["input_ids"]} for t in TEXTS]
    return rows, AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", None


def by_hand(folder: Path, task: str) -> tuple[dict[str, float], Any, list[dict[str, Any]]]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    make = {"token-classification": tagged, "question-answering": asked, "seq2seq": reversed_texts}[task]
    rows, auto, kind, collator = make(tokenizer)
    set_seed(42)
    model = auto.from_pretrained(folder / "base")
    collator = collator or DataCollatorForSeq2Seq(tokenizer, model)
    head = {"TOKEN_CLS": ["classifier"], "QUESTION_ANS": ["qa_outputs"]}.get(kind)
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=head, task_type=kind)
    model = get_peft_model(model, config)
    settings = arguments(folder, task) | {"output_dir": str(folder / "by_hand")}
    made = RegularizedTrainer(
        model, RegularizedTrainingArguments(**settings), train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, data_collator=collator, patches={"tlm": {"rate": 0.1}},
        penalties={"l2_sp": 0.01},
    )  # fmt: skip
    metrics = made.train().metrics
    made.save_model()
    return metrics | made.evaluate(), made, rows


def spans_by_hand(made: Any, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Exact match and F1, trying every span of every cut."""
    start, end = made.predict(rows).predictions[:2]
    best: dict[int, tuple[float, str]] = {}
    for number, (index, _, part) in enumerate(cut()):
        before = len(ANSWERS[index][0]) + 2
        for i in range(len(part)):
            for j in range(i, min(i + 12, len(part))):
                score = float(start[number][before + i] + end[number][before + j])
                if index not in best or score > best[index][0]:
                    best[index] = score, part[i : j + 1]
    pairs = [(best[index][1], [answer]) for index, (_, answer) in enumerate(ANSWERS)]
    mean = [100 * sum(score(*pair) for pair in pairs) / len(pairs) for score in (exact_match, f1)]
    return mean[0], mean[1]


@pytest.mark.parametrize("task", NEW)
def test_a_recipe_is_the_run_by_hand(tmp_path: Path, task: str) -> None:
    own = {"n_best": 64} if task == "question-answering" else {}
    path = write(tmp_path, task)
    found = trained(path, *(part for key in own for part in ("--set", f"data.{key}={own[key]}")))
    expected, made, rows = by_hand(tmp_path, task)
    for key, value in expected.items():
        if "runtime" not in key and "per_second" not in key:
            assert found[key] == pytest.approx(value, rel=1e-6), key
    saved, hand = (load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in ("out", "by_hand"))
    assert saved.keys() == hand.keys()
    assert all(torch.equal(saved[name], hand[name]) for name in hand)
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)
    if task == "question-answering":
        assert (found["eval_exact_match"], found["eval_f1"]) == pytest.approx(spans_by_hand(made, rows))
    if task == "token-classification":
        predictions = made.predict(rows)
        likeliest, labels = predictions.predictions.argmax(-1), predictions.label_ids
        right = [a == b for one, its in zip(likeliest, labels, strict=True) for a, b in zip(one, its, strict=True)
                 if b != -100]  # fmt: skip
        assert len(right) == sum(len(text.split()) for text in TEXTS)
        assert found["eval_accuracy"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize(("name", "task"), [("token_classification", "token-classification"), ("seq2seq", "seq2seq"),
                                            ("question_answering", "question-answering")])  # fmt: skip
def test_the_examples_run(tmp_path: Path, name: str, task: str) -> None:
    write(tmp_path, task)
    example = Path(__file__).parents[1] / "examples" / "recipes" / f"{name}.yaml"
    tiny = [f"model={tmp_path}/base", f"data.train={tmp_path}/rows.jsonl", f"data.eval={tmp_path}/rows.jsonl"]
    tiny += [f"train.output_dir={tmp_path}/out", "train.max_steps=2", "train.use_cpu=true", "train.report_to=none"]
    tiny += ["data.max_tokens=48"]
    tiny += ["adapter.r=4", "data.max_target_tokens=48"] if name == "seq2seq" else []
    tiny += ["data.stride=8"] if name == "question_answering" else []
    done = train(example, *(part for change in tiny for part in ("--set", change)))
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "eval_loss" in done.stdout and (tmp_path / "out" / "recipe.yaml").is_file()


# ---- tags


def test_tags_and_their_names(tmp_path: Path) -> None:
    path = write(tmp_path, "token-classification", adapter=None)
    trained(path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "long", "1": "short"}
    names = ["none", "short", "long"]  # of a ClassLabel: all of them, in its order
    kinds = Features(tokens=Sequence(Value("string")), tags=Sequence(ClassLabel(names=names)))
    rows = Dataset.from_list(ROWS["token-classification"], features=kinds)
    rows.save_to_disk(tmp_path / "rows")
    options = ["--set", f"data={{train: {tmp_path}/rows, max_tokens: 32}}", "--set", f"train.output_dir={tmp_path}/2"]
    assert train(path, *options).exit_code == 0
    saved = json.loads((tmp_path / "2" / "config.json").read_text())
    assert list(saved["id2label"].values()) == names


def test_words_by_themselves_are_those_of_a_text() -> None:
    vocabulary = {piece: index for index, piece in enumerate([*"<>ane", "Ġ", "Ġa", "ne"])}
    merges = [("Ġ", "a"), ("n", "e")]
    for own, expected in ((False, " "), (True, "")):
        backend = Tokenizer(models.BPE(vocabulary, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=own)
        made = PreTrainedTokenizerFast(tokenizer_object=backend)
        assert word_prefix(made) == expected
        ids = made([f"{expected}a", f"{expected}ne"], is_split_into_words=True)["input_ids"]
        assert made.convert_ids_to_tokens(ids) == ["Ġa", "Ġ", "ne"]
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    assert word_prefix(words) == ""


def test_words_that_do_not_fit_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "token-classification", data={"train": str(tmp_path / "rows.jsonl"), "max_tokens": 5})
    monkey = pytest.MonkeyPatch()
    said: list[str] = []
    monkey.setattr("hf_reg.runs.tasks.token_classification.logger.warning", said.append)
    try:
        trained(path)
    finally:
        monkey.undo()
    beyond = sum(  # the space before a word is beyond <bos> and four characters
        sum(len(word) + 1 for word in words[:i]) >= 4 for words in map(str.split, TEXTS) for i in range(len(words))
    )
    assert beyond and said[0].startswith(f"data.train: {beyond} words are beyond data.max_tokens (5)")


# ---- answers


def official_normalize(s: str) -> str:
    """As in SQuAD's evaluate-v1.1.py."""
    lowered = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())


def official_f1(prediction: str, truth: str) -> float:
    one, two = official_normalize(prediction).split(), official_normalize(truth).split()
    same = sum((Counter(one) & Counter(two)).values())
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(one), 1.0 * same / len(two)
    return (2 * precision * recall) / (precision + recall)


def test_the_scores_are_those_of_squad() -> None:
    pairs = [("The Cat!", ["cat"]), ("a cat sat", ["the cat", "sat, a dog"]), ("dog", ["cat"]), ("two two", ["two"])]
    for found, true in pairs:
        assert exact_match(found, true) == max(official_normalize(found) == official_normalize(t) for t in true)
        assert f1(found, true) == pytest.approx(max(official_f1(found, t) for t in true))
    assert exact_match("", []) == f1("", []) == 1 and exact_match("x", []) == f1("x", []) == 0


def test_questions_without_an_answer(tmp_path: Path) -> None:
    rows = [
        *ROWS["question-answering"],
        {**ROWS["question-answering"][0], "answers": {"text": [], "answer_start": []}},
    ]
    path = write(tmp_path, "question-answering")
    place = rows_file(tmp_path / "more.jsonl", rows)
    options = ["--set", f"data.train={place}", "--set", f"data.eval={place}"]
    said = refused(path, *options, code=1)
    assert said == "data.train: row 3 has no answer. Leave it out, or set data.no_answer: true."
    found = trained(path, *options, "--set", "data.no_answer=true", "--set", "train.learning_rate=0")
    assert 0 <= found["eval_exact_match"] <= found["eval_f1"] <= 100


def test_no_answer_needs_the_better_score() -> None:
    import numpy as np

    from hf_reg.runs.answers import Window, best_answer

    offsets = [None, (0, 3), (4, 7)]
    window = Window(np.array([2.0, 1.0, 0.0]), np.array([2.0, 0.0, 1.5]), offsets, 0)
    how: dict[str, Any] = {"n_best": 3, "longest": 5}
    assert best_answer("one two", [window], no_answer=False, **how) == "one two"
    assert best_answer("one two", [window], no_answer=True, **how) == ""
    sure = Window(np.array([1.0, 1.0, 0.0]), np.array([1.0, 0.0, 1.5]), offsets, 0)
    assert best_answer("one two", [window, sure], no_answer=True, **how) == "one two"  # the smallest null score
    assert best_answer("one two", [window], n_best=3, longest=1, no_answer=False) == "two"
    assert best_answer("one two", [window], n_best=1, longest=5, no_answer=False) == ""
    backwards = Window(np.array([0.0, 0.0, 5.0]), np.array([0.0, 5.0, 0.0]), offsets, 0)
    assert best_answer("one two", [backwards], no_answer=False, **how) == "two"


def test_answers_are_cut_at_both_ends() -> None:
    starts = {(index, first): part for index, first, part in cut()}
    whole = {place: ANSWERS[place[0]][1] in part for place, part in starts.items()}
    begins = {place: CONTEXTS[place[0]].index(ANSWERS[place[0]][1]) for place in starts}
    assert any(not whole[one] and one[1] <= begins[one] < one[1] + len(starts[one]) for one in starts)  # its end
    assert any(not whole[one] and begins[one] < one[1] < begins[one] + len(ANSWERS[one[0]][1]) for one in starts)


# ---- generated texts


def test_generated_texts_need_sacrebleu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_reg.runs.tasks.seq2seq.find_spec", lambda _: None)
    said = refused(write(tmp_path, "seq2seq"), "--set", "train.predict_with_generate=true")
    assert said.startswith("train.predict_with_generate: sacrebleu, which scores generated texts, is not installed")


# ---- what is wrong with data


BAD: dict[str, dict[str, tuple[list[dict[str, Any]], str]]] = {
    "token-classification": {
        "a text": ([{"tokens": "one two", "tags": ["a", "b"]}], "the column 'tokens' holds string; expected a list"),
        "lengths": ([{"tokens": ["one"], "tags": ["a"]}, {"tokens": ["one", "two"], "tags": ["a"]}],
                    "data.train: row 1 has 2 tokens and 1 tags; expected a tag for each token"),
        "none": ([{"tokens": ["one"], "tags": ["a"]}, {"tokens": ["two"], "tags": None}], "row 1 has none; expected"),
        "one tag": ([{"tokens": ["one"], "tags": ["a"]}], "the column 'tags' holds one tag, 'a'"),
        "numbers": ([{"tokens": [1], "tags": ["a"]}], "expected lists of words"),
        "halves": ([{"tokens": ["one"], "tags": [0.5]}], "expected texts or integers"),
        "empty": ([{"tokens": ["x"], "tags": ["a"]}, {"tokens": [], "tags": []}], "holds one tag"),
    },
    "question-answering": {
        "text": ([{"context": "a b", "question": "q", "answers": "a"}], "row 0 has the answers 'a'; expected {text:"),
        "place": ([{"context": "a b", "question": "q", "answers": {"text": ["b"], "answer_start": [1]}}],
                  "row 0: the answer 'b' is not in the context at 1; found ' '"),
        "long": ([{"context": "a b", "question": "q" * 30, "answers": {"text": ["b"], "answer_start": [2]}}],
                 "row 0: a question of 30 tokens leaves no room for a context. Give data.max_tokens above"),
        "list": ([{"context": ["a b"], "question": "q", "answers": {"text": ["b"], "answer_start": [2]}}],
                 "the column 'context' holds"),
    },
    "seq2seq": {
        "no target": ([{"source": "a"}], "has no column 'target'; found source."),
        "number": ([{"source": "a", "target": 3}], "the column 'target' holds int64; expected texts."),
        "blank": ([{"source": "a", "target": " "}], "all 1 rows have a blank source or target."),
    },
}  # fmt: skip


@pytest.mark.parametrize(("task", "case"), [(task, case) for task in BAD for case in BAD[task]])
def test_bad_columns_are_said_in_a_line(tmp_path: Path, task: str, case: str) -> None:
    rows, message = BAD[task][case]
    place = rows_file(tmp_path / "bad.jsonl", rows)
    said = refused(write(tmp_path, task), "--set", f"data.train={place}", code=1)
    assert message in said, said


def test_tags_that_training_has_not(tmp_path: Path) -> None:
    place = rows_file(tmp_path / "odd.jsonl", [{"tokens": ["one"], "tags": ["odd"]}])
    said = refused(write(tmp_path, "token-classification"), "--set", f"data.eval={place}", code=1)
    assert said == "data.eval has the tag 'odd', which data.train has not. Tags: long, short."


SETTINGS = {
    "question-answering": {"data.stride=-1": "data.stride: -1 is out of range", "data.n_best=0": "data.n_best: 0",
                           "data.stride=32": "data.stride: 32 tokens shared of 32; give fewer."},
    "seq2seq": {"data.max_target_tokens=1": "data.max_target_tokens: 1 is out of range"},
}  # fmt: skip


@pytest.mark.parametrize("task", SETTINGS)
def test_settings_out_of_range(tmp_path: Path, task: str) -> None:
    for change, message in SETTINGS[task].items():
        assert refused(write(tmp_path, task), "--set", change).startswith(message)


# ---- data out of a package


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package whose import fails, with a file of rows; the name is as good as any other."""
    folder = tmp_path / "site" / "rows_in_a_package"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('it is imported')")
    rows_file(folder / "data" / "x.jsonl", ROWS["causal-lm"])
    rows_file(tmp_path / "site" / "outside.jsonl", ROWS["causal-lm"])
    (folder / "link.jsonl").symlink_to(tmp_path / "site" / "outside.jsonl")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder.name


def test_data_out_of_a_package(tmp_path: Path, package: str) -> None:
    path = write(tmp_path, "causal-lm")
    expected = trained(path, "--set", "data.eval=null")
    data = f"data={{package: {package}, train: data/x.jsonl, max_tokens: 32}}"
    found = trained(path, "--set", data, "--set", f"train.output_dir={tmp_path}/out2")
    assert found["train_loss"] == expected["train_loss"]
    assert f"package: {package}" in (tmp_path / "out2" / "recipe.yaml").read_text()
    assert f"data/x.jsonl in the package {package}" in train(path, "--check", "--set", data).stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("train: ../outside.jsonl", "data.train: '../outside.jsonl' is outside of the package"),
        ("train: /etc/hostname", "data.train: '/etc/hostname' is outside of the package"),
        ("train: link.jsonl", "data.train: 'link.jsonl' is outside of the package"),
        ("train: data/x.jsonl, eval: data/y.jsonl", "data.eval: there is no file 'data/y.jsonl' in the package"),
        ("train: __init__.py", "ends in none of .csv"),
        ("train: a, name: b", "data: both package and name are given."),
        ("train: data/x.jsonl, revision: b", "data.revision: is for data.name"),
    ],
)
def test_places_outside_are_refused(tmp_path: Path, package: str, changes: str, message: str) -> None:
    said = refused(write(tmp_path, "causal-lm"), "--set", f"data={{package: {package}, {changes}}}")
    assert message in said, said


@pytest.mark.parametrize("name", ["no_such_package_here", "os.path", "../up", "sys"])
def test_packages_that_are_none(tmp_path: Path, name: str) -> None:
    said = refused(write(tmp_path, "causal-lm"), "--set", f"data={{package: {name!r}, train: x.jsonl}}")
    assert said.startswith(f"data.package: {name!r} is no installed package with a folder.")
