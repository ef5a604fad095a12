"""One run of a recipe, from the file to the saved model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hf_reg import __version__

from ..tables import terminal
from .data import load_data
from .errors import UseError, refused_as_run
from .recipe import Recipe, load_recipe, make_recipe, read_tree
from .settings import Settings, make_settings
from .smoke import SMOKE, smoke_run


__all__ = ["run_recipe", "train_from"]

STOPS = (ValueError, RuntimeError, FloatingPointError, OSError)  # of training: data, memory, terms, disk


def run_recipe(recipe: Recipe, settings: Settings, console: Console) -> dict[str, float]:
    """Train, save, evaluate; the final metrics.

    Raises:
        [`RunError`]: for data and models that cannot be loaded or combined, and for a training that stops.
    """
    from transformers import set_seed

    args = settings.args
    if args.process_index:
        _be_quiet()
    set_seed(args.seed)  # new heads and adapters are drawn before the trainer is made
    with args.main_process_first(desc="data"):
        data = load_data(recipe.data, recipe.COLUMNS)
    console.print("data:", ", ".join(f"{key} {len(rows)} rows" for key, rows in data.items()))
    trainer = recipe.make_trainer(settings, data)
    sizes = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    trained = sum(size for size, grows in sizes if grows)
    console.print(f"model: {trained:,} of {sum(size for size, _ in sizes):,} parameters are trained")
    if settings.checkpoint:
        console.print(Text(f"going on from {settings.checkpoint}"))
    with refused_as_run("training stopped", STOPS):
        metrics = dict(trainer.train(resume_from_checkpoint=settings.checkpoint).metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_model()
        trainer.save_state()
        if args.should_save:
            title = f"# hf-reg {__version__}: hf-reg train recipe.yaml\n"
            (Path(args.output_dir) / "recipe.yaml").write_text(title + recipe.resolved(), encoding="utf-8")
        if "eval" in data:
            evaluated = trainer.evaluate()
            evaluated |= recipe.further_metrics(evaluated)
            trainer.save_metrics("eval", evaluated)
            metrics |= evaluated
    return metrics


def _be_quiet() -> None:
    """Bars and warnings are those of the first process, which does and finds the same."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def train_from(
    path: Path, changes: Sequence[str] = (), *, check: bool = False, resume: bool = False, smoke: bool = False
) -> None:
    """`hf-reg train`: with `check`, print what would be done; else do it, with `smoke` on what stands for model and
    data."""
    if not smoke:
        _train(load_recipe(path, changes, resume), check=check)
        return
    if resume:
        raise UseError("--smoke and --resume: a smoke run keeps nothing to go on from. Leave one out.")
    with smoke_run(read_tree(path, changes)) as tree:
        _train(make_recipe(tree), check=check, note=SMOKE)


def _train(recipe: Recipe, *, check: bool, note: str = "") -> None:
    settings = make_settings(recipe)
    from .report import metrics_table, plan_table

    console = terminal()
    console.quiet = settings.args.process_index != 0
    if note:
        console.print(Text(note, style="bold"), soft_wrap=True)
    if check:
        console.print(Text(recipe.resolved()), soft_wrap=True)
        console.print(plan_table(recipe, settings))
        return
    metrics = run_recipe(recipe, settings, console)
    console.print(metrics_table(metrics))
    console.print(Text(note or f"The model is in {settings.args.output_dir}."), soft_wrap=True)
