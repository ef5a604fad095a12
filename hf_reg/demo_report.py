"""What `hf-reg demo` says, draws and writes about its runs."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .demo import Budget, Run, Setting

__all__ = ["Comparison", "Summary", "compare", "conclude", "introduce", "progress", "save_checkpoint", "summarize"]

# two-sided 95 % quantiles of Student's t by degrees of freedom, from 1; for more, the last one is slightly cautious
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Comparison:
    """One setting against another under the same seeds: mean difference in held-out loss, and its 95 % interval."""

    setting: str
    reference: str
    difference: float
    half_width: float | None  # None with one seed: no spread to judge by

    @property
    def verdict(self) -> str:
        """In words, and only as far as the spread of the seeds carries."""
        if self.half_width is None:
            return "cannot tell"
        if abs(self.difference) <= self.half_width:
            return "no clear difference"
        return "helped" if self.difference < 0 else "hurt"

    def sentence(self) -> str:
        """The verdict with its numbers."""
        interval = ""
        if self.half_width is not None:
            low, high = self.difference - self.half_width, self.difference + self.half_width
            interval = f", 95 % [{low:+.3f}, {high:+.3f}]"
        return (
            f"{self.setting} against {self.reference}: {self.verdict} (held-out loss {self.difference:+.3f}{interval})"
        )


def compare(setting: str, reference: str, losses: Sequence[float], reference_losses: Sequence[float]) -> Comparison:
    """Compare held-out losses that are paired by seed."""
    if not losses or len(losses) != len(reference_losses):
        raise ValueError(f"{len(losses)} and {len(reference_losses)} losses: expected one of each for every seed.")
    differences = [own - other for own, other in zip(losses, reference_losses, strict=True)]
    half_width = None
    if len(differences) > 1:
        quantile = T_95[min(len(differences) - 1, len(T_95)) - 1]
        half_width = quantile * stdev(differences) / len(differences) ** 0.5
    return Comparison(setting, reference, mean(differences), half_width)


@dataclass(frozen=True)
class Summary:
    """One setting at its last step: a list has one entry a seed."""

    setting: str
    held_out_accuracy: list[float]
    held_out_loss: list[float]
    accuracy_gap: list[float]  # training minus held-out
    loss_gap: list[float]  # held-out minus training
    relative_step_time: float


def summarize(runs: Sequence[Run], settings: Sequence[Setting], default: str) -> list[Summary]:
    """The last evaluation of every setting, and its step time relative to that of `default`."""
    base = {run.seed: run.seconds for run in runs if run.setting == default}
    summaries = []
    for setting in settings:
        own = [run for run in runs if run.setting == setting.name]
        ratios = [t / t0 for run in own for t, t0 in zip(run.seconds, base[run.seed], strict=True)]
        summaries.append(
            Summary(
                setting.name,
                [run.held_out_accuracy[-1] for run in own],
                [run.held_out_loss[-1] for run in own],
                [run.train_accuracy[-1] - run.held_out_accuracy[-1] for run in own],
                [run.held_out_loss[-1] - run.train_loss[-1] for run in own],
                median(ratios),
            )
        )
    return summaries


def introduce(console: Console, articles: int, budget: Budget, seeds: Sequence[int]) -> None:
    """Say what is about to happen."""
    console.print(
        f"MiniLM-L6 on BBC news: {articles} different articles in 5 classes. {budget.labels_per_class} a class are "
        f"labelled, {budget.held_out_per_class} held out, {budget.max_length} tokens of each are read; {budget.steps} "
        f"steps of {budget.batch_size}; seeds {', '.join(map(str, seeds))}.",
        highlight=False,
    )


@contextmanager
def progress(console: Console, total: int, every: int) -> Iterator[Callable[[str], None]]:
    """A progress bar in a terminal, a line for every `every` steps elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=total)
        done = 0

        def tick(text: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=text)
            if bar.disable and done % every == 0:
                console.print(f"{done}/{total} {text}", highlight=False)

        yield tick


def save_checkpoint(model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], output_dir: Path) -> str:
    """Save a patched model as it is, reload it with plain transformers, and say whether the logits agree."""
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = output_dir / "tlm-checkpoint"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        same = torch.equal(model.eval()(**inputs).logits, plain(**inputs).logits)
    verdict = "the same logits" if same else "DIFFERENT logits: please report this"
    return f"{folder}: reloaded with plain AutoModelForSequenceClassification, {verdict}"


def _cell(values: Sequence[float], scale: float, digits: int) -> str:
    text = f"{mean(values) * scale:.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values) * scale:.{digits}f}"


def _table(summaries: Sequence[Summary], comparisons: dict[str, Comparison], reference: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for header in ("held-out\naccuracy %", "held-out\nloss", "train-test\ngap, points", "train-test\ngap, loss"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("step\ntime", justify="right", no_wrap=True)
    table.add_column(f"against\n{reference}", no_wrap=True)
    for row in summaries:
        verdict = comparisons[row.setting].verdict if row.setting in comparisons else "-"
        table.add_row(
            row.setting,
            _cell(row.held_out_accuracy, 100, 1),
            _cell(row.held_out_loss, 1, 2),
            _cell(row.accuracy_gap, 100, 1),
            _cell(row.loss_gap, 1, 2),
            f"{row.relative_step_time:.2f}",
            verdict,
        )
    return table


def conclude(
    console: Console, runs: Sequence[Run], settings: Sequence[Setting], budget: Budget, saved: str, output_dir: Path
) -> Path:
    """Print the table and the verdicts; write `curves.png` and `results.json`. The first setting is the plain one, the
    second the default that the others are measured against as well."""
    plain, default, *methods = (setting.name for setting in settings)
    summaries = summarize(runs, settings, default)
    loss = {row.setting: row.held_out_loss for row in summaries}
    against_plain = {name: compare(name, plain, loss[name], loss[plain]) for name in (default, *methods)}
    against_default = {name: compare(name, default, loss[name], loss[default]) for name in methods}

    comparisons = [*against_plain.values(), *against_default.values()]
    console.print(_table(summaries, against_plain, plain))
    seeds = len({run.seed for run in runs})
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    console.print(
        f"{spread}; gap: training against held-out articles;\n"
        f"step time: relative to {default}, median over steps that the settings take in turn",
        style="dim",
        highlight=False,
    )
    for setting in settings:
        console.print(f"  {setting.name}: {setting.describe()}", style="dim", highlight=False)
    console.print()
    if seeds == 1:
        console.print("One seed cannot tell help from chance: give --seed several times, or leave --quick out.")
    else:
        for comparison in comparisons:
            console.print(comparison.sentence(), highlight=False)
        helped = [name for name in methods if against_default[name].verdict == "helped"]
        console.print(
            f"In short: {' and '.join(helped) or 'neither ' + ' nor '.join(methods)} did better than {default} here. "
            f"With {len(comparisons)} comparisons, one may look clear by chance.",
            highlight=False,
        )
    _draw(runs, settings, output_dir / "curves.png")
    results = output_dir / "results.json"
    import torch
    import transformers

    record = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "budget": asdict(budget),
        "settings": [asdict(setting) for setting in settings],
        "summary": [asdict(row) for row in summaries],
        "comparisons": [{**asdict(comparison), "verdict": comparison.verdict} for comparison in comparisons],
        "checkpoint": saved,
        "runs": [asdict(run) for run in runs],
    }
    results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"\n{saved}\n{output_dir / 'curves.png'}\n{results}", highlight=False, soft_wrap=True)
    return results


def _draw(runs: Sequence[Run], settings: Sequence[Setting], path: Path) -> None:
    """Training and held-out loss over the steps, mean of the seeds."""
    from .report import loss_curves

    histories = {
        setting.name: [
            [
                {"step": step, "train_loss": train, "eval_loss": held_out}
                for step, train, held_out in zip(run.steps, run.train_loss, run.held_out_loss, strict=True)
            ]
            for run in runs
            if run.setting == setting.name
        ]
        for setting in settings
    }
    loss_curves(histories, reference=settings[1].name).savefig(path, dpi=150)
