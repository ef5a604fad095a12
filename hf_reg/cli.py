"""The command line: `hf-reg train`, `compare`, `diagnose`, `methods`, `inspect`, `merge`, `verify`, `push`, `demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .tables import terminal


__all__ = ["app", "main"]


app = typer.Typer(
    name="hf-reg",
    help="Regularization for fine-tuning Hugging Face models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


SMOKE = Annotated[
    bool,
    typer.Option("--smoke", help="Try the recipe in seconds, on a tiny random model and generated rows."),
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON, for programs, instead of tables.")]


@app.callback()
def _root() -> None:
    """Regularization for fine-tuning Hugging Face models."""


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="One seed and half the steps: under a minute.")] = False,
    output_dir: Annotated[Path, typer.Option(help="Where curves, results and checkpoint go.")] = Path("demo-output"),
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Give it once for each seed; left out: 0, 1 and 2, or with --quick 0."),
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
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE", help="A YAML file with the keys task, model, data, train and what regularizes."
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: --set train.learning_rate=1e-4."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Show what would be done, and load nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in output_dir.")] = False,
    smoke: SMOKE = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", envvar="HF_REG_TRACEBACK", help="Show errors with their traceback.")
    ] = False,
) -> None:
    """Fine-tune a model as a recipe says, and save it with its metrics.

    On several devices: accelerate launch -m hf_reg.cli train RECIPE
    """
    from .runs import train_from, user_errors

    with user_errors(f"hf-reg train {recipe}", traceback):
        train_from(recipe, changes or (), check=check, resume=resume, smoke=smoke)


@app.command()
def compare(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="A YAML file as of hf-reg train, with a section compare."),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: --set compare.seeds=5."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Show what would be run, and load nothing.")] = False,
    smoke: SMOKE = False,
    as_json: JSON = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", envvar="HF_REG_TRACEBACK", help="Show errors with their traceback.")
    ] = False,
) -> None:
    """Compare ways to fine-tune on the same data, budget and seeds, and test the differences.

    What is finished is kept: the same command goes on with a comparison that was stopped. Exit code 1 if a run failed.
    """
    from .runs import user_errors

    with user_errors(f"hf-reg compare {recipe}", traceback):
        from .comparison.command import compare_from

        found = compare_from(recipe, changes or (), check=check, quiet=as_json, smoke=smoke)
        _show(found, found.as_json() if as_json else None)
        if found.failures:
            raise typer.Exit(1)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this one in full, such as tlm.")] = None,
    as_json: JSON = False,
) -> None:
    """List the methods with their settings and defaults, or show one in full.

    In full: definition, settings and where their defaults come from, paper, measured cost, example.
    """
    from .commands.methods import find_method, known_methods, methods_table
    from .runs.errors import user_errors

    with user_errors("hf-reg methods"):
        if name is not None:
            one = find_method(name)
            _show(one, one.as_json() if as_json else None)
        else:
            listed = [method.in_short() for method in known_methods()] if as_json else None
            _show(None if as_json else methods_table(), listed)


@app.command(name="inspect")
def inspect_(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A folder, or a name on the Hub; only its configuration is read."),
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    as_json: JSON = False,
) -> None:
    """Show what each method would patch in a model, and what is out of reach.

    Neither weights nor code of the model are read.
    """
    from .runs.errors import user_errors

    with user_errors(f"hf-reg inspect {model}"):
        from .commands.inspection import inspect_model

        found = inspect_model(model, revision)
        _show(found, found.as_json() if as_json else None)


@app.command()
def diagnose(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The output folder of a Trainer, or a trainer_state.json.")
    ],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw losses and findings into it: .png, .svg or .pdf.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Say what a run's logs show, and what to try next.

    Over-fitting and since when, a plateau, penalties that dominate or do nothing, patches and dropout that never ran;
    also of runs that were made without hf_reg. Exit code 0 if it could judge, whatever the verdict.
    """
    from .runs.errors import user_errors

    with user_errors(f"hf-reg diagnose {run}"):
        from .commands.diagnosing import diagnose_folder

        found = diagnose_folder(run, plot)
        _show(found, found.as_json() if as_json else None)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder with adapter_config.json.")],
    output: Annotated[
        Path,
        typer.Argument(metavar="OUTPUT", help="The folder for the merged model; empty, or not there yet."),
    ],
    base: Annotated[str | None, typer.Option(help="The base model, if not the one that the adapter names.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is in OUTPUT.")] = False,
    as_json: JSON = False,
) -> None:
    """Merge an adapter into its base model, and save a stock model.

    It is merged in fp32; the largest change of a logit is shown.
    """
    from .runs.errors import user_errors

    with user_errors(f"hf-reg merge {adapter}"):
        from .commands.merging import merge_folder

        done = merge_folder(adapter, output, base, force=force)
        _show(done, done.as_json() if as_json else None)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint: a model, or an adapter.")],
    as_json: JSON = False,
) -> None:
    """Check that a checkpoint is sound and safe; exit code 1 if it is not.

    Looked at are files, recipe, keys, dtypes, logits and card, also as a process without hf_reg loads them.
    """
    from .runs.errors import UseError, refused_as_run, user_errors

    with user_errors(f"hf-reg verify {folder}"):
        if not folder.is_dir():
            raise UseError(f"there is no folder {str(folder)!r} (looked in {Path.cwd()}). Give that of a checkpoint.")
        from .checkpoints.verification import verify_checkpoint

        with refused_as_run("it cannot be looked at"):
            found = verify_checkpoint(folder)
        _show(found, found.as_dict() if as_json else None)
        if not found.passed:
            raise typer.Exit(1)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint: a model, or an adapter.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME; it is made if it is not there.")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Who may see a repository that is made; left out: as the account has it."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch to push to; it is made if it is not there.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The repository of the model that was fine-tuned.")] = None,
    message: Annotated[str, typer.Option(help="The message of the commit.")] = "Push with hf_reg",
) -> None:
    """Push a checkpoint to the Hub, verified and with its card, in one commit.

    Log in with `hf auth login` before.
    """
    from .runs.errors import UseError, refused_as_run, user_errors

    with user_errors(f"hf-reg push {folder}"):
        if not folder.is_dir():
            raise UseError(f"there is no folder {str(folder)!r} (looked in {Path.cwd()}). Give that of a checkpoint.")
        from .hub import push_to_hub

        with refused_as_run("it is not pushed"):
            commit = push_to_hub(
                folder, repo_id, private=private, revision=revision, commit_message=message, base_model=base_model
            )
        typer.echo(str(commit))


def _show(found: Any, plain: Any) -> None:
    """Tables for people, or, where `plain` is given, JSON for machines."""
    if plain is not None:
        typer.echo(json.dumps(plain, indent=1, default=repr))
    else:
        terminal().print(getattr(found, "_table", lambda: found)())


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
