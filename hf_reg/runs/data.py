"""Data sets of a recipe: files, folders of `save_to_disk` or names on the Hub, with the columns that a task needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..json_text import read_json
from ..names import nearest
from .errors import RecipeError, RunError, refused_as_recipe, refused_as_run
from .sections import Section


__all__ = ["Data", "TextData", "file_in_package", "load_data", "with_text"]

logger = logging.getLogger("transformers.hf_reg")

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
SPLITS = "dataset_dict.json"  # of a `DatasetDict` on disk
SAVED = "state.json"  # of a `Dataset` on disk


@dataclass(frozen=True)
class Data(Section):
    """Where the examples are.

    Args:
        train (`str`): a file (.csv, .json, .jsonl, .parquet, .txt), a folder of `save_to_disk`, or a split of `name`.
        eval (`str`, *optional*): the same, held out.
        name (`str`, *optional*): a data set on the Hub, or a folder of splits: then `train` and `eval` are splits.
        config, revision (`str`, *optional*): of the data set on the Hub.
        package (`str`, *optional*):
            An installed Python package, by the name that is imported, which is not done: then `train` and `eval` are
            files inside of it.
        columns (`dict`, *optional*): the data's own names of the task's columns, such as `{text: review}`.
    """

    train: str = field(metadata={"help": "Give a file, or with data.name a split."})
    eval: str | None = None
    name: str | None = None
    config: str | None = None
    revision: str | None = None
    package: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def check(self, where: str) -> None:
        parts = {"train": self.train, **({} if self.eval is None else {"eval": self.eval})}
        if self.package is not None and self.name is not None:
            raise RecipeError(f"{where}: both package and name are given. Leave one out.")
        if self.name is None:
            for key in ("config", "revision"):
                if getattr(self, key) is not None:
                    raise RecipeError(f"{where}.{key}: is for data.name, a data set on the Hub. Leave it out.")
            for key, place in parts.items():
                if self.package is None:
                    _check_place(f"{where}.{key}", place)
                else:
                    _check_place(f"{where}.{key}", str(file_in_package(self.package, place, where, key)))
            return
        folder = Path(self.name).expanduser()
        if self.name.startswith((".", "/", "~")) and not folder.is_dir():
            raise RecipeError(f"{where}.name: there is no folder {self.name!r} (looked in {Path.cwd()}).")
        if (folder / SPLITS).is_file():
            splits = _splits(folder / SPLITS, f"{where}.name")
            for key, split in parts.items():
                if split not in splits:
                    raise RecipeError(
                        f"{where}.{key}: {self.name} has no split {split!r}.{nearest(split, splits)} "
                        f"Splits: {', '.join(splits)}."
                    )

    def shown(self, place: str) -> str:
        """A file or split, and what it is in."""
        if self.package is not None:
            return f"{place} in the package {self.package}"
        return place if self.name is None else f"{self.name}, split {place}"


def file_in_package(package: str, place: str, where: str = "data", key: str = "train") -> Path:
    """The file `place` in the folder of an installed package, which is found without being imported.

    Raises:
        [`RecipeError`]: for a package that is not installed, and a place outside of its folder.
    """
    try:
        spec = find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise RecipeError(
            f"{where}.package: {package!r} is no installed package with a folder. Install it, and give the name that "
            "Python imports."
        )
    for folder in (Path(folder).resolve() for folder in folders):
        path = (folder / place).resolve()
        if not path.is_relative_to(folder):
            raise RecipeError(f"{where}.{key}: {place!r} is outside of the package {package}. Give a file in it.")
        if path.exists():
            return path
    raise RecipeError(f"{where}.{key}: there is no file {place!r} in the package {package} ({folders[0]}).")


def _splits(path: Path, where: str) -> list[str]:
    with refused_as_recipe(where):
        found = read_json(path).get("splits")
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise RecipeError(f"{where}: {path} names no splits. Save the data again with DatasetDict.save_to_disk.")
    return found


@dataclass(frozen=True)
class TextData(Data):
    """Data whose texts are cut after `max_tokens` (`int`, defaults to 512)."""

    max_tokens: int = 512

    def check(self, where: str) -> None:
        super().check(where)
        if self.max_tokens < 2:
            raise RecipeError(f"{where}.max_tokens: {self.max_tokens} is out of range; give 2 or more.")


def _check_place(where: str, place: str) -> None:
    path = Path(place).expanduser()
    if not path.exists():
        raise RecipeError(
            f"{where}: there is no file {place!r} (looked in {Path.cwd()}). Give a file that is there, or "
            "data.name for a data set on the Hub."
        )
    if (path / SPLITS).is_file():
        raise RecipeError(f"{where}: {place!r} holds several splits. Give data.name: {place}, and splits of it.")
    if path.is_dir() and not (path / SAVED).is_file():
        raise RecipeError(f"{where}: {place!r} was not written by Dataset.save_to_disk. Give a file or such a folder.")
    if path.is_file() and path.suffix.lower() not in READERS:
        raise RecipeError(f"{where}: {place!r} ends in none of {', '.join(READERS)}. Convert it to one of these.")


def _read(data: Data, place: str) -> Any:
    import datasets

    if data.name is not None:
        folder = Path(data.name).expanduser()
        if (folder / SPLITS).is_file():
            return datasets.load_from_disk(str(folder))[place]
        name = str(folder) if folder.is_dir() else data.name
        return datasets.load_dataset(name, data.config, revision=data.revision, split=place)
    path = Path(place).expanduser() if data.package is None else file_in_package(data.package, place)
    if path.is_dir():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(READERS[path.suffix.lower()], data_files=str(path), split="train")


def load_data(data: Data, needed: Sequence[str]) -> dict[str, Any]:
    """The data sets `train` and, if the recipe has it, `eval`, with the columns `needed`.

    Raises:
        [`RunError`]: for data that cannot be read, is empty, or lacks a column.
    """
    loaded = {}
    for key, place in {"train": data.train, "eval": data.eval}.items():
        if place is None:
            continue
        where = f"data.{key} ({data.shown(place)})"
        with refused_as_run(f"{where} cannot be loaded", (Exception,)):  # datasets has many classes of its own
            rows = _read(data, place)
        if missing := [theirs for theirs in data.columns.values() if theirs not in rows.column_names]:
            raise RunError(f"{where}: data.columns names {missing[0]!r}; found {', '.join(rows.column_names)}.")
        renamed = {theirs: ours for ours, theirs in data.columns.items() if theirs != ours}
        replaced = [ours for ours in renamed.values() if ours in rows.column_names and ours not in renamed]
        with refused_as_run(f"{where}: data.columns"):
            rows = rows.remove_columns(replaced).rename_columns(renamed)
        if missing := [name for name in needed if name not in rows.column_names]:
            raise RunError(
                f"{where} has no column {missing[0]!r}; found {', '.join(rows.column_names)}. Name yours in the "
                f"recipe: data: {{columns: {{{missing[0]}: YOURS}}}}."
            )
        if not len(rows):
            raise RunError(f"{where} has no rows.")
        loaded[key] = rows
    return loaded


def with_text(data: Mapping[str, Any], columns: Sequence[str] = ("text",)) -> dict[str, Any]:
    """The rows whose texts are not blank; a log message counts the others.

    Raises:
        [`RunError`]: for a column of something else than text, or if no row is left.
    """
    kept = {}
    for key, rows in data.items():
        for column in columns:
            if (kind := getattr(rows.features[column], "dtype", "a list")) not in ("string", "large_string"):
                raise RunError(f"data.{key}: the column {column!r} holds {kind}; expected texts.")
        left = rows.filter(lambda *cells: all(cell and cell.strip() for cell in cells), input_columns=list(columns))
        if not len(left):
            raise RunError(f"data.{key}: all {len(rows)} rows have a blank {' or '.join(columns)}.")
        if len(left) < len(rows):
            logger.warning(f"data.{key}: {len(rows) - len(left)} of {len(rows)} rows are blank and left out.")
        kept[key] = left
    return kept
