"""A recipe: what `RECIPE.yaml` and `--set` say, read and checked before anything loads."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from ..names import nearest, shown
from ..yaml_text import dump_yaml, load_yaml
from .data import Data
from .errors import RecipeError, one_line
from .sections import Section, check_keys, read_section


if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["Model", "Recipe", "load_recipe", "make_recipe", "put", "read_tree"]

BARE = {"model": "name", "ref_model": "name", "adapter": "type"}  # sections that a text can stand for
LARGEST = 1_000_000  # bytes of a recipe; we chose it, ours have a thousand
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Model(Section):
    """A model by name.

    Args:
        name (`str`): a folder or a name on the Hub. Code that comes with a model is never run.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        dtype (`str`, *optional*):
            Of its weights: `"auto"` (as stored), `"float32"`, `"bfloat16"` or `"float16"`. `None`: `"auto"` below an
            adapter, and `"float32"` where the weights themselves are trained, since small steps vanish in half
            precision (`train.bf16` still computes in it).
        attn_implementation (`str`, *optional*): such as `"sdpa"` or `"flash_attention_2"`.
    """

    SHORT: ClassVar[str] = "name"

    name: str = field(metadata={"help": "Give a folder or a name on the Hub."})
    revision: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None

    def check(self, where: str) -> None:
        path_like = self.name.startswith((".", "/", "~")) or self.name.count("/") > 1 or os.sep == "\\" in self.name
        if not self.name or (path_like and not Path(self.name).expanduser().is_dir()):
            raise RecipeError(
                f"{where}: {self.name!r} is no folder here. Give one, or a name on the Hub (owner/name)."
            )
        if self.dtype not in (None, *DTYPES):
            raise RecipeError(f"{where}.dtype: {self.dtype!r} is not known; choose one of {', '.join(DTYPES)}.")

    @property
    def place(self) -> str:
        """What `from_pretrained` is given."""
        return os.path.expanduser(self.name)


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """What every task's recipe has. A task is a subclass: its further keys, and how its trainer is made.

    Args:
        model ([`Model`]): what is fine-tuned.
        data: what it is trained and evaluated on.
        train (`dict`): fields of the task's arguments class, and `resume` (`True`, or the folder of a checkpoint).
        adapter (`dict` or `str`, *optional*): `type` (lora, sorsa or balora) and fields of its configuration.
        patches, penalties: as in [`RegularizedTrainingArguments`].
    """

    TASK: ClassVar[str]
    TITLE: ClassVar[str]
    COLUMNS: ClassVar[tuple[str, ...]]  # that the data must have
    OPTIONAL_COLUMNS: ClassVar[tuple[str, ...]] = ()
    PEFT_TYPE: ClassVar[str]  # peft's name of the task
    ARGUMENTS: ClassVar[str] = "hf_reg.training.arguments:RegularizedTrainingArguments"
    LOSS: ClassVar[str] = ""  # in words, where the arguments have no `formula`
    PACKAGES: ClassVar[Mapping[str, str]] = {"datasets": "datasets"}  # modules that a run needs, and their packages

    model: Model = field(metadata={"help": "Give a folder or a name on the Hub."})
    adapter: dict | str | None = None
    patches: dict | str | list | None = None
    penalties: dict | str | list | None = None
    data: Data = field(metadata={"help": "Give data: {train: FILE}, or data: {name: DATASET, train: SPLIT}."})
    train: dict = field(metadata={"help": "Give train: {output_dir: FOLDER} and other training arguments."})

    def check(self, where: str) -> None:
        check_keys(self.data.columns, (*self.COLUMNS, *self.OPTIONAL_COLUMNS), "data.columns")
        theirs = list(self.data.columns.values())
        if twice := next((name for name in theirs if theirs.count(name) > 1), None):
            raise RecipeError(f"data.columns: {twice!r} stands for two columns. Give each one of its own.")
        if not self.train.get("output_dir"):
            raise RecipeError("train.output_dir: missing. Give the folder for checkpoints and the model.")

    def resolved(self) -> str:
        """The recipe as YAML, with what `--set` changed; to run again from the start."""
        said = {key: value for key, value in asdict(self).items() if value is not None}
        said["data"] = {key: value for key, value in said["data"].items() if value not in (None, {})}
        said["train"] = {key: value for key, value in self.train.items() if key != "resume"}
        said |= {key: _in_short(said[key]) for key in ("model", "ref_model") if key in said}
        if not said.get("metrics"):
            said.pop("metrics", None)
        else:
            said["metrics"] = [_in_short(one) for one in said["metrics"]]
        return dump_yaml({"task": self.TASK, **said})

    def models(self) -> dict[str, str]:
        """Which models take part, by what they are here."""
        return {"model": self.model.name}

    def make_trainer(self, settings: Settings, data: Mapping[str, Any]) -> Any:
        """The trainer of this task, with its models loaded, for the data sets `train` and perhaps `eval`."""
        raise NotImplementedError(f"{type(self).__name__} must define `make_trainer(settings, data)`.")

    def further_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What follows from the metrics of an evaluation, such as a perplexity."""
        return {}


def _in_short(section: Mapping[str, Any]) -> Any:
    own = {name: value for name, value in section.items() if value not in (None, {})}
    return own if len(own) > 1 else own["name"]


def _read(path: Path) -> Any:
    if not path.is_file():
        what = f"{str(path)!r} is no file" if path.exists() else f"there is no file {str(path)!r}"
        raise RecipeError(f"{what} (looked in {Path.cwd()}). Give the path of a YAML file.")
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise RecipeError(f"it is larger than {LARGEST:,} bytes, which no recipe is. Give the path of a recipe.")
        return load_yaml(text.decode("utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(f"{line}not YAML: {getattr(error, 'problem', None) or one_line(error)}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read: {error}.") from error


def _check_numbers(value: Any, where: str = "") -> None:
    """Raise [`RecipeError`] for a number that nothing can be set to: not finite, or an integer beyond 64 bits."""
    if isinstance(value, dict):
        for key, one in value.items():
            _check_numbers(one, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            _check_numbers(one, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: {value} is no finite number. Give one.")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise RecipeError(f"{where}: {shown(value)} is beyond the integers of 64 bits. Give a smaller one.")


def put(tree: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Set `key`, names with dots between them, in the plain values of a recipe; `said` is how an error calls it."""
    *path, last = key.split(".")
    section = tree
    for done, name in enumerate(path, start=1):
        inside = section.get(name)
        if done == 1 and name in BARE and isinstance(inside, str):
            inside = {BARE[name]: inside}
        section[name] = section = {} if inside is None else inside
        if not isinstance(section, dict):
            raise RecipeError(f"{said}: {'.'.join(path[:done])} is {shown(section)}, which has no keys below it.")
    section[last] = value


def _change(tree: dict[str, Any], change: str) -> None:
    """Carry out one `--set KEY=VALUE`."""
    key, sign, text = change.partition("=")
    if not sign or not all(key.strip().split(".")):
        raise RecipeError(f"--set {change}: expected KEY=VALUE, such as --set train.learning_rate=1e-4.")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or one_line(error)
        raise RecipeError(
            f"--set {key}={shown(text)[1:-1]}: the value is not YAML ({why}). Quote it: --set '{key}=\"...\"'."
        ) from error
    put(tree, key.strip(), value, f"--set {change}")


def read_tree(source: Path | Mapping[str, Any], changes: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a recipe, in the file `source` or given, changed by `--set`.

    Raises:
        [`RecipeError`]: for what is no recipe, and numbers that nothing can be set to.
    """
    tree = deepcopy(dict(source)) if isinstance(source, Mapping) else _read(source)
    if not isinstance(tree, dict):
        raise RecipeError(f"expected keys such as task, model, data and train, found {shown(tree)}.")
    for change in changes:
        _change(tree, change)
    _check_numbers(tree)
    return tree


def make_recipe(tree: Mapping[str, Any]) -> Recipe:
    """The recipe that the plain values `tree` say.

    Raises:
        [`RecipeError`]: for all that is wrong with it as far as it can be told without loading anything.
    """
    from .tasks import TASKS

    task = tree.get("task")
    if not isinstance(task, str) or task not in TASKS:
        found = "missing." if task is None else f"{shown(task)} is not known.{nearest(task, list(TASKS))}"
        raise RecipeError(f"task: {found} Known tasks: {', '.join(TASKS)}.")
    cls = TASKS[task]
    check_keys(tree, ["task", *(one.name for one in fields(cls))], "")
    return read_section(cls, {key: value for key, value in tree.items() if key != "task"})


def load_recipe(path: Path, changes: Sequence[str] = (), resume: bool = False) -> Recipe:
    """The recipe in the file `path`, changed by `--set` and `--resume`.

    Raises:
        [`RecipeError`]: for all that is wrong with it as far as it can be told without loading anything.
    """
    tree = read_tree(path, changes)
    if resume and isinstance(tree.get("train"), dict):
        tree["train"]["resume"] = tree["train"].get("resume") or True
    return make_recipe(tree)
