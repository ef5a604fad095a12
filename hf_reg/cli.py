"""The command line: `hf-reg train`, `hf-reg demo`, `hf-reg methods`."""

from __future__ import annotations

import inspect
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .tables import terminal


__all__ = ["app", "main"]


app = typer.Typer(
    name="hf-reg",
    help="Regularization for fine-tuning Hugging Face models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Regularization for fine-tuning Hugging Face models."""


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="One seed and half the steps: under a minute.")] = False,
    output_dir: Annotated[Path, typer.Option(help="Where curves, results and checkpoint go.")] = Path("demo-output"),
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="Repeat it for several; default: 0, 1 and 2, with --quick 0.")
    ] = None,
) -> None:
    """Fine-tune a real encoder four ways on a few labelled news articles, and compare."""
    from .demo import FULL, QUICK, run_demo
    from .demo_data import DemoError

    console = terminal()
    try:
        seeds = tuple(dict.fromkeys(seed or ((0,) if quick else (0, 1, 2))))
        run_demo(output_dir, seeds=seeds, budget=QUICK if quick else FULL, console=console)
    except DemoError as error:
        Console(stderr=True).print(f"hf-reg demo: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: task, model, data, train and what regularizes.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: --set train.learning_rate=1e-4."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what would be done, and load nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in output_dir.")] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", envvar="HF_REG_TRACEBACK", help="Errors with their traceback.")
    ] = False,
) -> None:
    """Fine-tune a model as a recipe says; `accelerate launch -m hf_reg.cli train RECIPE` on many devices."""
    from .runs import train_from, user_errors

    with user_errors(f"hf-reg train {recipe}", traceback):
        train_from(recipe, changes or (), check=check, resume=resume)


def _summary(patch: Any) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join((inspect.getdoc(patch) or "").partition("\n\n")[0].split())


def _defaults(patch: Any) -> dict[str, Any]:
    """The settings of a `Patch` class and their defaults, those of the method itself first."""
    own = [f for f in fields(patch) if f.init and not f.kw_only]
    return {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default
        for f in (*own, *(f for f in fields(patch) if f.init and f.kw_only))
    }


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON array.")] = False,
) -> None:
    """List the methods that `patch_model` knows by name, with their settings and defaults."""
    from .patches import PATCHES

    rows = [(name, _summary(patch), _defaults(patch)) for name, patch in PATCHES.items()]
    if as_json:
        keys = ("name", "description", "settings")
        typer.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1, default=repr))
        return
    table = Table("name", "what it does", "settings and defaults", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, description, settings in rows:
        table.add_row(name, description, ", ".join(f"{key}={value!r}" for key, value in settings.items()))
    terminal().print(table)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
