"""Tiny models, data and recipes in a folder, and `hf-reg train` on them in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import processors
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration, set_seed
from typer.testing import CliRunner, Result

from hf_reg.cli import app

from .preferences.models import llama
from .preferences.words import PLAIN, WORDS, tokenizer


TEXTS = [
    "a red ball",
    "the blue sky is high",
    "one two three",
    "up",
    "and down we go",
    "stone wall",
    "left wing",
    "so",
]
LABELS = ["toy", "air", "toy", "air", "toy", "toy", "air", "air"]
CONTEXTS = ["the red ball is in the stone house on the high hill", "a blue sky", "one two three and then one more"]
ANSWERS = [("where", "stone house"), ("who", "blue"), ("what", "then")]
ROWS: dict[str, list[dict[str, Any]]] = {
    "preference": PLAIN,
    "causal-lm": [{"text": text} for text in TEXTS],
    "sequence-classification": [{"text": t, "label": label} for t, label in zip(TEXTS, LABELS, strict=True)],
    "token-classification": [
        {"tokens": text.split(), "tags": ["short" if len(word) < 4 else "long" for word in text.split()]}
        for text in TEXTS
    ],
    "question-answering": [
        {"context": context, "question": asked, "answers": {"text": [text], "answer_start": [context.index(text)]}}
        for context, (asked, text) in zip(CONTEXTS, ANSWERS, strict=True)
    ],
    "seq2seq": [{"source": text, "target": text[::-1]} for text in TEXTS],
}
TASKS = ["preference", "causal-lm", "sequence-classification"]
OWN_DATA: dict[str, dict[str, Any]] = {
    "preference": {},
    "question-answering": {"max_tokens": 32, "stride": 6, "max_answer_tokens": 12},
    "seq2seq": {"max_tokens": 32, "max_target_tokens": 32},
}


def bert() -> BertForSequenceClassification:
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, max_position_embeddings=64, **sizes))


def t5() -> T5ForConditionalGeneration:
    set_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, eos_token_id=2, **sizes))


def pair_tokenizer() -> Any:
    """The tokenizer, with a token between the two texts of a pair."""
    made = tokenizer()
    marks = {"special_tokens": [("<bos>", 1), ("<eos>", 2)]}
    made._tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <eos> $B:1", **marks)
    return made


def model_of(task: str) -> Any:
    if task == "seq2seq":
        return t5()
    return llama() if task in ("preference", "causal-lm") else bert().bert


def write(folder: Path, task: str, **changes: Any) -> Path:
    """A model, its data and a recipe for four steps of the whole batch; `changes` replace whole sections."""
    base, rows = folder / "base", folder / "rows.jsonl"
    if not base.exists():
        model_of(task).save_pretrained(base)
        (pair_tokenizer() if task == "question-answering" else tokenizer()).save_pretrained(base)
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    recipe = {
        "task": task,
        "model": str(base),
        "adapter": {"type": "lora", "r": 4, "target_modules": "all-linear"},
        "patches": {"tlm": {"rate": 0.1}},
        "penalties": {"l2_sp": 0.01},
        "data": {"train": str(rows), "eval": str(rows)} | OWN_DATA.get(task, {"max_tokens": 32}),
        "train": arguments(folder, task),
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    return path


def arguments(folder: Path, task: str, **settings: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {"output_dir": str(folder / "out"), "use_cpu": True, "report_to": "none"}
    fixed |= {"max_steps": 4, "learning_rate": 0.01, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    own = {"beta": 0.3, "eta": 0.5, "max_length": 64} if task == "preference" else {}
    return {**fixed, **own, **settings}


def train(recipe: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["train", str(recipe), *options])


def trained(recipe: Path, *options: str) -> dict[str, float]:
    """The final metrics of a run that must succeed."""
    done = train(recipe, *options)
    assert done.exit_code == 0, done.output + repr(done.exception)
    out = yaml.safe_load((recipe.parent / "out" / "recipe.yaml").read_text())["train"]["output_dir"]
    return json.loads((Path(out) / "all_results.json").read_text())


def refused(recipe: Path, *options: str, code: int = 2) -> str:
    """The one line of a refusal."""
    done = train(recipe, *options)
    assert done.exit_code == code, done.output + repr(done.exception)
    lines = [line for line in done.stderr.splitlines() if line.startswith("hf-reg train")]
    assert len(lines) == 1 and "Traceback" not in done.output, done.output
    return lines[0].removeprefix(f"hf-reg train {recipe}: ")
