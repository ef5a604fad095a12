"""A real encoder fine-tuned four ways on a few labelled news articles: what `hf-reg demo` runs.

All settings train in lockstep, one step of each in turn, on the same articles in the same order from the same initial
weights: their losses are a paired comparison, and their step times compare even on a machine that is busy.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import demo_report
from .demo_data import Article, DemoError, load_articles, minilm_folder, require_packages, split_articles


if TYPE_CHECKING:
    import torch
    from rich.console import Console

__all__ = ["FULL", "QUICK", "SETTINGS", "Budget", "Run", "Setting", "run_demo"]


@dataclass(frozen=True)
class Budget:
    """What every setting may use: enough for the unregularized model to over-fit visibly.

    Chosen by looking at that model alone, under seeds (100, 101) that the demo does not use.
    """

    steps: int = 60
    batch_size: int = 4
    labels_per_class: int = 4
    held_out_per_class: int = 30
    max_length: int = 32
    learning_rate: float = 3e-4
    evaluate_every: int = 12
    warm_up: int = 3  # steps left out of the timing


FULL = Budget()
QUICK = replace(FULL, steps=24, held_out_per_class=20)


@dataclass(frozen=True)
class Setting:
    """One way to fine-tune: the dropout of the model's config, and the patch if any."""

    name: str
    hidden_dropout: float
    attention_dropout: float
    patch: str | None = None
    options: dict[str, float] = field(default_factory=dict)

    def describe(self) -> str:
        """The setting in words."""
        text = f"hidden dropout {self.hidden_dropout:g}, attention dropout {self.attention_dropout:g}"
        return text + "".join(f", {self.patch} {key}={value:g}" for key, value in self.options.items())


PLAIN, DEFAULT = Setting("unregularized", 0.0, 0.0), Setting("HF default", 0.1, 0.1)
SETTINGS = (
    PLAIN,
    DEFAULT,
    Setting("DropHead", 0.1, 0.0, "drophead", {"p": 0.2}),
    Setting("TLM", 0.1, 0.0, "tlm", {"rate": 0.1}),
)


@dataclass
class Run:
    """What one setting did under one seed. Losses and accuracies are those of evaluation mode."""

    setting: str
    seed: int
    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    held_out_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of every timed step


def _batches(size: int, budget: Budget, seed: int) -> list[list[int]]:
    """The rows of every step: whole passes over the sample, each in a new order."""
    draw = random.Random(seed)
    rows: list[int] = []
    while len(rows) < budget.steps * budget.batch_size:
        rows += draw.sample(range(size), size)
    return [rows[i * budget.batch_size : (i + 1) * budget.batch_size] for i in range(budget.steps)]


def _load(setting: Setting, labels: Sequence[str], seed: int) -> torch.nn.Module:
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    from . import patch_model

    torch.manual_seed(seed)  # the classification head is drawn from it
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # only here: it would report for every model that the head is new, as it should be
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(),
            hidden_dropout_prob=setting.hidden_dropout,
            attention_probs_dropout_prob=setting.attention_dropout,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    finally:
        logging.set_verbosity(before)
    return patch_model(model, setting.patch, **setting.options) if setting.patch else model


Encoded = tuple[dict[str, "torch.Tensor"], "torch.Tensor"]


def _encode(articles: Sequence[Article], labels: Sequence[str], tokenizer: Any, max_length: int) -> Encoded:
    import torch

    texts = [article.text for article in articles]
    inputs = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return dict(inputs), torch.tensor([labels.index(article.label) for article in articles])


def _evaluate(model: torch.nn.Module, data: Encoded) -> tuple[float, float]:
    """Loss and accuracy in evaluation mode."""
    import torch

    inputs, targets = data
    model.eval()
    with torch.inference_mode():
        parts = [
            model(**{key: value[i : i + 50] for key, value in inputs.items()}).logits
            for i in range(0, len(targets), 50)
        ]
    logits = torch.cat(parts)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    return loss.item(), (logits.argmax(-1) == targets).float().mean().item()


def _train_in_lockstep(
    labels: Sequence[str], train: Encoded, held_out: Encoded, budget: Budget, seed: int, tick: Callable[[str], None]
) -> tuple[list[Run], dict[str, torch.nn.Module]]:
    import torch

    models = {setting.name: _load(setting, labels, seed) for setting in SETTINGS}
    runs = {name: Run(name, seed) for name in models}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=budget.learning_rate, weight_decay=0.0, fused=True)
        for name, model in models.items()
    }
    names = list(models)
    for step, rows in enumerate(_batches(len(train[1]), budget, seed), start=1):
        names = names[1:] + names[:1]  # nobody always runs first
        inputs, targets = {key: value[rows] for key, value in train[0].items()}, train[1][rows]
        for name in names:
            model, run = models[name].train(), runs[name]
            torch.manual_seed(seed * 100_003 + step)  # each setting draws as if it ran alone
            start = time.perf_counter()
            torch.nn.functional.cross_entropy(model(**inputs).logits, targets).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if step > budget.warm_up:
                run.seconds.append(time.perf_counter() - start)
            if step % budget.evaluate_every == 0 or step == budget.steps:
                run.steps.append(step)
                for part, data in (("train", train), ("held_out", held_out)):
                    loss, accuracy = _evaluate(model, data)
                    getattr(run, f"{part}_loss").append(loss)
                    getattr(run, f"{part}_accuracy").append(accuracy)
        tick(f"seed {seed}, step {step}/{budget.steps}")
    return list(runs.values()), models


def run_demo(output_dir: Path, *, seeds: Sequence[int] = (0, 1, 2), budget: Budget = FULL, console: Console) -> Path:
    """Train every setting under every seed, show the table and write curves, results and a checkpoint.

    Args:
        output_dir (`Path`): receives `curves.png`, `results.json` and `tlm-checkpoint/`; older ones are replaced.
        seeds (sequence of `int`): each draws its own labelled articles, head and order.
        budget ([`Budget`]): [`FULL`] or [`QUICK`].
        console (`rich.console.Console`): where progress and table go.

    Returns:
        `Path`: `results.json`.
    """
    require_packages()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"Cannot write to {output_dir} ({error.strerror}): choose another --output-dir.") from error
    articles = load_articles()
    demo_report.introduce(console, len(articles), budget, seeds)
    began = time.perf_counter()
    runs: list[Run] = []
    saved = ""
    with demo_report.progress(console, len(seeds) * budget.steps, budget.evaluate_every) as tick:
        os.environ.setdefault(
            "OMP_WAIT_POLICY", "passive"
        )  # spinning threads stall for seconds where cores are shared
        import torch
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading weights: the demo has its own
        torch.set_num_threads(2)
        tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
        for seed in seeds:
            labels, train, held_out = split_articles(
                articles,
                labels_per_class=budget.labels_per_class,
                held_out_per_class=budget.held_out_per_class,
                seed=seed,
            )
            data = [_encode(part, labels, tokenizer, budget.max_length) for part in (train, held_out)]
            new, models = _train_in_lockstep(labels, data[0], data[1], budget, seed, tick)
            runs += new
            saved = saved or demo_report.save_checkpoint(models["TLM"], tokenizer, data[1][0], output_dir)
    results = demo_report.conclude(console, runs, SETTINGS, budget, saved, output_dir)
    console.print(f"{time.perf_counter() - began:.0f} s", style="dim", highlight=False)
    return results
