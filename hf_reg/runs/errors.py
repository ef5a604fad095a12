"""What went wrong, as one line for the user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console


__all__ = ["RecipeError", "RunError", "UseError", "one_line", "refused_as_recipe", "refused_as_run", "user_errors"]

REFUSALS = (ValueError, TypeError, RuntimeError, ImportError, OSError)  # how libraries say that they cannot


class UseError(ValueError):
    """A command that cannot be carried out as it was given: exit code 2."""


class RecipeError(UseError):
    """A recipe that cannot be run as it is written: exit code 2."""


class RunError(Exception):
    """A run that could not go on: exit code 1."""


def one_line(error: BaseException) -> str:
    """Its message without line breaks, and that of its cause where a library wrapped it; what an answer of the Hub
    means is in the message of whoever asked."""
    text = " ".join(str(error).split()) or type(error).__name__
    answer = "HfHubHTTPError" in [cls.__name__ for cls in type(error.__cause__).__mro__]
    cause = "" if answer else " ".join(str(error.__cause__ or "").split())
    return f"{text} ({cause})" if cause and cause not in text else text


@contextmanager
def refused_as_recipe(where: str) -> Iterator[None]:
    """What a library refuses about the settings in `where`."""
    try:
        yield
    except RecipeError:
        raise
    except REFUSALS as error:
        raise RecipeError(f"{where}: {one_line(error)}") from error


@contextmanager
def refused_as_run(what: str, kinds: tuple[type[Exception], ...] = REFUSALS) -> Iterator[None]:
    """What stops the run while it is doing `what`; other errors than `kinds` are mistakes of the program."""
    try:
        yield
    except (UseError, RunError):
        raise
    except kinds as error:
        raise RunError(f"{what}: {one_line(error)}") from error


@contextmanager
def user_errors(command: str, traceback: bool = False) -> Iterator[None]:
    """One red line on stderr and an exit code, instead of a traceback. A recipe is wrong on every process alike: then
    one of each machine says so."""
    try:
        yield
    except (UseError, RunError) as error:
        if traceback:
            raise
        use, rank = isinstance(error, UseError), os.environ.get("RANK")
        if not use or os.environ.get("LOCAL_RANK", "0") == "0":
            who = command if use or rank is None else f"{command} (process {rank})"
            Console(stderr=True).print(f"{who}: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2 if use else 1) from error
