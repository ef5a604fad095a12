"""`metrics` of a recipe: scripts of `evaluate`, computed beside the built-in scores from the same predictions."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from datasets import Features, Sequence, Value
from sacrebleu import corpus_bleu, corpus_chrf
from sklearn.metrics import f1_score
from transformers import AutoTokenizer

from hf_reg.runs import load_recipe
from hf_reg.runs.metrics import Outputs, _columns, class_scores, scoring
from hf_reg.runs.tasks.question_answering import answer_scores
from hf_reg.runs.tasks.seq2seq import translation_scores

from .distributed.launch import environment
from .tiny_runs import ANSWERS, LABELS, TEXTS, refused, train, trained, write


INT, TEXT = 'Value("int64")', 'Value("string")'
SQUAD = f"""{{"id": {TEXT}, "answers": Sequence({{"text": {TEXT}, "answer_start": {INT}}})}}"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield


def script(folder: Path, name: str, predictions: str, references: str, result: str, settings: str = "") -> str:
    """A metric as people write one for evaluate; it notes what it was given."""
    path = folder / f"{name}.py"
    path.write_text(f"""
import json
import evaluate
from datasets import Features, Sequence, Value


class Own(evaluate.Metric):
    def _info(self):
        kinds = Features({{"predictions": {predictions}, "references": {references}}})
        return evaluate.MetricInfo(description="own", citation="", inputs_description="", features=kinds)

    def _compute(self, predictions, references{settings}):
        with open({str(folder / "seen.jsonl")!r}, "a") as file:
            file.write(json.dumps([list(predictions), list(references)]) + "\\n")
        return {result}
""")
    return str(path)


def seen(folder: Path) -> list[Any]:
    """What the metrics of a run were given, without the trials."""
    return [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]


SHARE = '{"score": sum(a == b for a, b in zip(predictions, references)) / len(predictions)}'


def test_the_same_predictions(tmp_path: Path) -> None:
    path = script(tmp_path, "share", INT, INT, SHARE)
    named = script(tmp_path, "named", TEXT, TEXT, '{"score": 1, "more": {"n": [1, 2], "version": "a"}}')
    recipe = write(tmp_path, "sequence-classification", metrics=[path, {"name": named, "label": "words"}])
    found = trained(recipe)
    assert found["eval_share/score"] == found["eval_accuracy"]
    assert found["eval_words/score"] == 1 and found["eval_words/more/n/1"] == 2
    assert not any("version" in key for key in found)
    trial, words, classes, names = seen(tmp_path)
    assert trial == [[0, 1], [0, 1]] and words == [["air", "toy"], ["air", "toy"]]
    assert classes[1] == [["air", "toy"].index(label) for label in LABELS] and names[1] == LABELS
    assert names[0] == [["air", "toy"][index] for index in classes[0]]
    again = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert again == load_recipe(recipe)
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["metrics"][0] == path


def test_words_and_their_rows(tmp_path: Path) -> None:
    words = script(tmp_path, "words", INT, INT, SHARE)
    rows = script(tmp_path, "rows", f"Sequence({TEXT})", f"Sequence({TEXT})", '{"rows": len(predictions)}')
    found = trained(write(tmp_path, "token-classification", metrics=[words, rows]))
    assert found["eval_words/score"] == found["eval_accuracy"] and found["eval_rows/rows"] == len(TEXTS)
    flat, by_row = seen(tmp_path)[2:]
    tags = [["short" if len(word) < 4 else "long" for word in text.split()] for text in TEXTS]
    assert by_row[1] == tags and flat[1] == [["long", "short"].index(tag) for row in tags for tag in row]


def test_answers(tmp_path: Path) -> None:
    squad = script(tmp_path, "squad", f'{{"id": {TEXT}, "prediction_text": {TEXT}}}', SQUAD, '{"n": len(predictions)}')
    many = script(
        tmp_path, "many", TEXT, f"Sequence({TEXT})", '{"in": sum(a in b for a, b in zip(predictions, references))}'
    )
    found = trained(write(tmp_path, "question-answering", metrics=[squad, many]))
    assert found["eval_squad/n"] == len(ANSWERS) and found["eval_exact_match"] == 100 * found["eval_many/in"] / 3
    pairs, texts = seen(tmp_path)[2:]
    assert [row["id"] for row in pairs[0]] == [row["id"] for row in pairs[1]] == ["0", "1", "2"]
    assert [row["prediction_text"] for row in pairs[0]] == texts[0]
    assert texts[1] == [row["answers"]["text"] for row in pairs[1]] == [[answer] for _, answer in ANSWERS]


def test_generated_texts(tmp_path: Path) -> None:
    one = script(tmp_path, "one", TEXT, TEXT, '{"n": len(predictions)}')
    recipe = write(tmp_path, "seq2seq", metrics=[one])
    assert refused(recipe) == "metrics: are of generated texts. Set train.predict_with_generate: true."
    found = trained(recipe, "--set", "train.predict_with_generate=true", "--set", "train.generation_max_length=6")
    assert found["eval_one/n"] == len(TEXTS) and {"eval_bleu", "eval_chrf"} <= set(found)
    written, wanted = seen(tmp_path)[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    ids = [tokenizer(text[::-1], add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert wanted == tokenizer.batch_decode(ids) and len(written) == len(TEXTS)
    assert found["eval_bleu"] == pytest.approx(corpus_bleu(written, [wanted]).score)
    assert found["eval_chrf"] == pytest.approx(corpus_chrf(written, [wanted]).score)


def test_settings_and_folders_and_the_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scaled").mkdir()
    script(tmp_path / "scaled", "scaled", INT, INT, '{"score": scale}', ", scale=1")
    monkeypatch.chdir(tmp_path)
    recipe = write(tmp_path, "sequence-classification", metrics=[{"name": "scaled", "settings": {"scale": 3}}])
    best = ["train.eval_strategy=steps", "train.eval_steps=2", "train.save_strategy=steps", "train.save_steps=2"]
    best += ["train.load_best_model_at_end=true", "train.metric_for_best_model=scaled/score"]
    found = trained(recipe, *(part for change in best for part in ("--set", change)))
    assert found["eval_scaled/score"] == 3
    shown = train(recipe, "--check", "--set", f"train.output_dir={tmp_path}/2").stdout
    assert "scaled, from" in " ".join(shown.split())


def test_squad_by_hand() -> None:
    found = answer_scores(Outputs(["The Cat!", "a cat sat", "", ""], [["cat"], ["cat", "dog"], [], ["x"]]))
    assert found == {"exact_match": 50, "f1": pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4)}


def test_bleu_and_chrf_by_hand() -> None:
    """One sentence of five tokens, four of them right: n-grams 4/5, 3/4, 2/3, 1/2; all in the same length."""
    found = translation_scores(Outputs(["the cat sat down today"], [["the cat sat down now"]]))
    assert found["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    short = translation_scores(Outputs(["the cat sat down"], [["the cat sat down now"]]))  # all right, a token too few
    assert short["bleu"] == pytest.approx(100 * math.exp(1 - 5 / 4))
    assert translation_scores(Outputs(["a b c d"], [["a b c d"]])) == pytest.approx({"bleu": 100, "chrf": 100})
    assert 0 < found["chrf"] < 100 and translation_scores(Outputs(["xyz"], [["abc"]]))["chrf"] == 0


def test_the_first_form_that_fits() -> None:
    forms = [
        Features(predictions=Sequence(Value("string")), references=Sequence(Value("string"))),
        Features(predictions=Value("string"), references=Sequence(Value("string"))),
        Features(predictions=Value("string"), references=Value("string")),
    ]
    texts = Outputs(["a"], [["b", "c"]])
    assert _columns(forms, texts) == {"predictions": ["a"], "references": [["b", "c"]]}
    assert _columns(forms[2], texts) == {"predictions": ["a"], "references": ["b"]}
    for form in (Features(predictions=Value("int32"), references=Value("int32")), Features(data=Value("string"))):
        with pytest.raises(ValueError, match="which cannot be made of texts"):
            _columns(form, texts)
    with pytest.raises(ValueError, match="which cannot be made of classes"):
        _columns(forms[0], Outputs([0], [1], ["x", "y"]))


def test_scores_of_several_parts() -> None:
    compute = scoring(lambda found: Outputs(found, [0, 1, 1], ["a", "b"]), class_scores, lambda _: {"own/x": 1.0})
    macro = f1_score([0, 1, 1], [0, 0, 1], average="macro")
    assert compute([0, 0, 1]) == {"accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx(macro), "own/x": 1.0}


# ---- what is said before anything loads


def test_what_is_no_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_reg.runs.run.run_recipe", lambda *_: pytest.fail("something was loaded"))
    path = script(tmp_path, "share", INT, INT, SHARE)
    recipe = write(tmp_path, "sequence-classification", metrics=[path])
    said = {
        "metrics=accuracy": "metrics: expected a list, found 'accuracy' (text).",
        "metrics=[./nowhere.py]": "metrics[0]: './nowhere.py' is no script (looked in",
        f"metrics=[{tmp_path}]": f"metrics[0]: '{tmp_path}' is no script",
        "metrics=[a/b/c]": "metrics[0]: 'a/b/c' is no script",
        "metrics=[accuracy]": "metrics[0]: 'accuracy' is a name on the Hub, but HF_HUB_OFFLINE or HF_EVALUATE_OFFLINE",
        "metrics=[{nmae: x}]": "metrics[0].nmae: unknown key. Did you mean 'name'?",
        f"metrics=[{path}, {path}]": "metrics: two are named 'share'. Give one of them a label: {name: ..., label:",
        "data.eval=null": "metrics: there is no data.eval to compute them on. Give it.",
    }
    for change, text in said.items():
        assert refused(recipe, "--set", change).startswith(text), change
    assert "metrics: unknown key" in refused(write(tmp_path, "causal-lm", metrics=[path]))
    monkeypatch.setattr("hf_reg.runs.metrics.find_spec", lambda name: None)
    recipe = write(tmp_path, "sequence-classification", metrics=[path])
    assert 'evaluate, which metrics need, is not installed: pip install "hf_reg[train]"' in refused(recipe)


def test_a_metric_of_the_hub_that_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(tmp_path, "sequence-classification", metrics=["someone/own"])
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert "is a name on the Hub" in refused(recipe)
    (tmp_path / "modules" / "evaluate_modules" / "metrics" / "someone--own").mkdir(parents=True)
    assert load_recipe(recipe).metrics[0].script is None  # type: ignore[attr-defined]


BROKEN = {
    "raises": (INT, INT, "1 / 0", "metrics: raises: division by zero"),
    "form": (
        f"Sequence({INT})",
        f"Sequence({INT})",
        "{}",
        "metrics: form: it takes {'predictions': List(Value('int64'))",
    ),
    "syntax": (INT, INT, "{", "metric "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_metric_that_fails_is_found_before_training(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_reg.trainer.RegularizerMixin.train", lambda *_, **__: pytest.fail("it is training"))
    *parts, text = BROKEN[name]
    path = script(tmp_path, name, *parts)
    said = refused(write(tmp_path, "sequence-classification", metrics=[path]), code=1)
    assert said.startswith(text), said


def test_evaluate_is_imported_only_where_it_is_asked_for(tmp_path: Path) -> None:
    path = script(tmp_path, "share", INT, INT, SHARE)
    recipe = write(tmp_path, "sequence-classification", metrics=[path])
    code = "import sys; from hf_reg.cli import app; app(sys.argv[1:], standalone_mode=False)"
    code += "; print('evaluate' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(recipe), "--check"], env=environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr
