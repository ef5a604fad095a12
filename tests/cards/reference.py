"""The reference checkpoints of model_cards/: what the examples train with `--smoke`, and the baseline of each."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import set_seed

from hf_reg.cards import Facts, card_of, facts_of


ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
SMOKE = (
    "The example's smoke run: a tiny, randomly initialised model, made-up data and four steps. It shows what a card "
    "looks like, and is of no use."
)


@dataclass(frozen=True)
class Reference:
    """A checkpoint: the example that trains it, its options, and those of the baseline."""

    example: str
    trainer: str
    options: list[str]
    baseline: list[str]
    baseline_is: str
    given: dict[str, Any] = field(default_factory=dict)


REFERENCES = {
    "bert-tlm": Reference(
        "finetune_classification", "RegularizedTrainer",
        ["--learning_rate", "1e-3", "--patches", "{tlm: {rate: 0.1}}", "--penalties", "l2_sp: 0.01"],
        ["--learning_rate", "1e-3"],
        "the same run without TLM and L2-SP, with the attention dropout of BERT's configuration",
        {"evaluated_on": "made-up texts of two classes"},
    ),
    "llama-sorsa": Reference(
        "finetune_lora", "RegularizedTrainer",
        ["--learning_rate", "1e-3", "--method", "sorsa", "--r", "4", "--gamma", "0.0133"],
        ["--learning_rate", "1e-3", "--method", "lora", "--r", "4"],
        "plain LoRA of the same rank in the same run",
        {"evaluated_on": "counting modulo 50"},
    ),
    "llama-rpo": Reference(
        "train_rpo", "RPOTrainer",
        ["--learning_rate", "1e-3", "--beta", "0.1", "--eta", "0.2", "--rank", "4"],
        ["--learning_rate", "1e-3", "--beta", "0.1", "--eta", "0", "--rank", "4"],
        "DPO (eta = 0) in the same run, whose loss is another quantity",
        {"evaluated_on": "counting up or down"},
    ),
}  # fmt: skip


def trained(reference: Reference, options: list[str], folder: Path) -> Any:
    """The trainer of an example, after its smoke run in this process."""
    path = ROOT / "examples" / f"{reference.example}.py"
    spec = importlib.util.spec_from_file_location(f"card_{reference.example}", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    made: list[Any] = []
    fixed = ["--smoke", "--use_cpu", "--save_strategy", "no", "--disable_tqdm", "true", "--output_dir", str(folder)]
    sys.modules[spec.name] = example  # dataclasses look their module up
    spec.loader.exec_module(example)
    cls: Any = getattr(example, reference.trainer)

    class Kept(cls):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    Kept.__name__ = cls.__name__
    arguments = [path.name, *fixed, *options]
    with mock.patch.object(example, reference.trainer, Kept), mock.patch.object(sys, "argv", arguments):
        set_seed(42)  # a model and its baseline start from the same weights
        example.main()
    return made[0]


def record(name: str, folder: Path) -> Facts:
    """Train a reference checkpoint and its baseline, and read the facts."""
    one = REFERENCES[name]
    baseline = facts_of(trained(one, one.baseline, folder / "baseline")).results
    facts = facts_of(trained(one, one.options, folder / name))
    incomparable = ("loss",) if facts.reference else ("loss_",)  # another loss; terms of the loss
    shared = {key: baseline[key] for key in facts.results if key in baseline and not key.startswith(incomparable)}
    return facts_of(
        facts, name=name, repo_id="", hardware="1 x CPU", baseline=shared, baseline_is=one.baseline_is,
        limits=[SMOKE], license="apache-2.0", **one.given,
    )  # fmt: skip


def render(name: str) -> str:
    """The card of the facts that are kept."""
    return str(card_of(Facts.from_json((CARDS / f"{name}.json").read_text(encoding="utf-8"))))
