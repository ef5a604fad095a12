"""What a recipe with a section `compare` says: methods, sizes, seeds, and how they are run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..names import nearest
from ..runs.errors import RecipeError, refused_as_recipe
from ..runs.recipe import Recipe, make_recipe, put, read_tree
from ..runs.sections import Section, check_value, read_section
from ..runs.settings import make_settings
from ..yaml_text import load_yaml
from .methods import Method, read_methods
from .tasks import TASK_FACTS, TaskFacts


__all__ = ["Compare", "Plan", "Probe", "Tuning", "read_plan"]

PACKAGES = {
    "optuna": "optuna", "scipy": "scipy", "matplotlib": "matplotlib", "jinja2": "jinja2", "filelock": "filelock"
}  # fmt: skip
OF_A_RUN = {  # arguments of a run that a cell sets itself: it is measured by its own plan, and not saved
    "output_dir", "seed", "data_seed", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "report_to",
    "disable_tqdm", "logging_strategy", "logging_steps", "push_to_hub",
}  # fmt: skip
REFUSED = {
    "load_best_model_at_end": "it would choose checkpoints by the held-out data that methods are compared on",
    "resume": "finished cells are not repeated anyway",
}


@dataclass(frozen=True)
class Tuning(Section):
    """The search for each method's settings, with as many trials for each.

    Args:
        trials (`int`, *optional*, defaults to 10): of each method; the first one has its defaults. Our choice.
        seeds (`list[int]`, *optional*, defaults to `[1000, 1001, 1002]`):
            None of the comparison's; the loss is their mean. Our choice, made after a result: by one seed the search
            without dropout took a learning rate at which two of ten other seeds stayed near 40 % (MiniLM, 200
            questions of six types), by three a lower one at which none did. Other methods' rates stayed as they were.
        size (`int` or `float`, *optional*): labelled examples of a trial; `None`: the middle one of `sizes`.
        validation (`int` or `float`, *optional*):
            Rows, or fraction of the train split, that trials are judged by; no cell trains on them. `None`: a fifth,
            at most 500. Our choice.
        search (`dict`): `{method: {setting: range}}`, in place of or beside a method's own; `null` leaves one out.
    """

    trials: int = 10
    seeds: list[int] = field(default_factory=lambda: [1000, 1001, 1002])
    size: int | float | None = None
    validation: int | float | None = None
    search: dict = field(default_factory=dict)

    def check(self, where: str) -> None:
        if self.trials < 1 or not self.seeds:
            raise RecipeError(f"{where}: found {self.trials} trials on {len(self.seeds)} seeds; give at least one.")
        for name in ("size", "validation"):
            _check_size(getattr(self, name), f"{where}.{name}")


@dataclass(frozen=True)
class Probe(Section):
    """Texts that no method trains on: what the model says of them shows what it forgets.

    Args:
        file (`str`): with an example a row, as `data.train`.
        column (`str`, *optional*, defaults to `"text"`): of the texts.
        rows (`int`, *optional*, defaults to 100): how many are used. Our choice.
    """

    SHORT = "file"

    file: str = field(metadata={"help": "Give a file of texts."})
    column: str = "text"
    rows: int = 100

    def check(self, where: str) -> None:
        if self.rows < 1:
            raise RecipeError(f"{where}.rows: {self.rows} is out of range; give 1 or more.")


@dataclass(frozen=True)
class Compare(Section):
    """The section `compare` of a recipe.

    Args:
        methods (`list` or `dict`, *optional*): names of known methods, or `{name: settings}` ([`Method`]).
        sizes (`list`): numbers of labelled examples (`int`), or fractions of the data to train on (`float`).
        seeds (`list[int]` or `int`, *optional*, defaults to 10): of sample, head, order and masks; 10 means 0 to 9.
        reference (`str`, *optional*, defaults to `"hf_default"`): what all others are compared with.
        tuning ([`Tuning`], *optional*): `none` leaves methods at their defaults.
        probe ([`Probe`], *optional*): `None`: 100 rows of the held-out data.
        evaluate_every (`int`, *optional*): optimizer steps between points of a curve; `None`: a fifth of the run.
        cost_steps (`int`, *optional*, defaults to 30): timed steps of each method, 2 or more; 0 measures no cost.
        alpha (`float`, *optional*, defaults to 0.05): of verdicts, after Holm's correction.
        metric (`str`, *optional*): what methods are judged by first; `None`: the task's.
        lower_is_better (`list[str]`): metrics of the recipe's own of which that is so.
        processes (`int`, *optional*): `None`: as many as cores allow; with an accelerator, one.
        threads (`int`, *optional*, defaults to 1): of each process; numbers depend on it.
        folder (`str`, *optional*): of the results; `None`: `train.output_dir`.
    """

    methods: Any = None
    sizes: list = field(default_factory=lambda: [1.0])
    seeds: list[int] | int = 10
    reference: str = "hf_default"
    tuning: Tuning | None = field(default_factory=Tuning)
    probe: Probe | None = None
    evaluate_every: int | None = None
    cost_steps: int = 30
    alpha: float = 0.05
    metric: str | None = None
    lower_is_better: list[str] = field(default_factory=list)
    processes: int | None = None
    threads: int = 1
    folder: str | None = None

    def check(self, where: str) -> None:
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            raise RecipeError(f"{where}.sizes: found {self.sizes}; give sizes, each once.")
        for index, size in enumerate(self.sizes):
            _check_size(size, f"{where}.sizes[{index}]")
        found = self.every_seed
        if not found or len(set(found)) < len(found) or min(found) < 0:
            raise RecipeError(f"{where}.seeds: found {self.seeds}; give seeds of 0 or more, each once, or how many.")
        if self.tuning is not None and set(self.tuning.seeds) & set(found):
            raise RecipeError(f"{where}.tuning.seeds: {self.tuning.seeds} has seeds of the comparison. Give others.")
        if not 0 < self.alpha < 1:
            raise RecipeError(f"{where}.alpha: {self.alpha} is out of range; give one between 0 and 1.")
        for name, least in {"evaluate_every": 1, "cost_steps": 0, "processes": 1, "threads": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{where}.{name}: {value} is out of range; give {least} or more.")
        if self.cost_steps == 1:
            raise RecipeError(f"{where}.cost_steps: one step has no quartiles; give 2 or more, or 0 for none.")

    @property
    def every_seed(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


def _check_size(size: Any, where: str) -> None:
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, (int, float)) or size <= 0 or (type(size) is float and size > 1):
        raise RecipeError(
            f"{where}: {size!r} is no size. Give a number of examples such as 100, or a fraction such as 0.1."
        )


@dataclass(frozen=True)
class Plan:
    """A comparison, checked: the recipe without what regularizes, its section `compare`, and the methods."""

    recipe: Recipe
    compare: Compare
    methods: dict[str, Method]

    @property
    def folder(self) -> Path:
        return Path(str(self.compare.folder or self.recipe.train["output_dir"])).expanduser()

    @property
    def facts(self) -> TaskFacts:
        return TASK_FACTS[self.recipe.TASK]

    def settings(self, name: str) -> dict[str, Any]:
        """What determines the numbers of a method, before any search."""
        return self.methods[name].settings(self.recipe.adapter)

    def run_recipe(self, settings: Mapping[str, Any], folder: str, seed: int, **fixed: Any) -> Recipe:
        """The recipe of one run of a method with these settings."""
        kept = {key: value for key, value in self.recipe.train.items() if key not in OF_A_RUN}
        own = {
            "output_dir": folder, "seed": seed, "data_seed": seed, "eval_strategy": "no", "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "logging_strategy": "steps", "logging_steps": 1,
        }  # fmt: skip
        parts = {key: settings[key] for key in ("adapter", "patches", "penalties")}
        return replace(self.recipe, **parts, train=kept | dict(settings["train"]) | own | fixed)

    def tree(self) -> dict[str, Any]:
        """The recipe as plain values: to run the same comparison again."""
        compare = {key: value for key, value in asdict(self.compare).items() if value is not None}
        compare |= {"tuning": compare.get("tuning") or "none", "folder": str(self.folder)}
        compare["methods"] = {
            name: {key: value for key, value in asdict(method).items() if value not in (None, {})}
            for name, method in self.methods.items()
        }
        if self.compare.tuning is None:
            for method in compare["methods"].values():
                method.pop("search", None)
        else:
            compare["tuning"] = {k: v for k, v in compare["tuning"].items() if v is not None and k != "search"}
        return load_yaml(self.recipe.resolved()) | {"compare": compare}

    @property
    def processes(self) -> int:
        """How many run at a time."""
        if self.compare.processes is not None:
            return self.compare.processes
        import torch

        if torch.accelerator.is_available() and not self.recipe.train.get("use_cpu"):
            return 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(cores // self.compare.threads, 1)


def _check_packages() -> None:
    absent = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if absent:
        raise RecipeError(
            f'{" and ".join(absent)} is not installed, which comparisons need: pip install "hf_reg[compare]".'
        )


def _methods(recipe: Recipe, compare: Compare) -> dict[str, Method]:
    facts = TASK_FACTS[recipe.TASK]
    own = () if recipe.adapter else facts.adapters
    default = ["no_dropout", "hf_default", *(["tuned_dropout"] if compare.tuning else []), "tlm", "drophead", *own]
    rate = float(recipe.train.get("learning_rate", 5e-5))  # the default of TrainingArguments
    methods = read_methods(compare.methods, default, learning_rate=rate, bare=not recipe.adapter)
    for name, ranges in compare.tuning.search.items() if compare.tuning is not None else ():
        where = f"compare.tuning.search.{name}"
        if name not in methods:
            raise RecipeError(f"{where}: is no method here.{nearest(name, list(methods))}")
        check_value(ranges, dict, where)
        methods[name] = replace(methods[name], search=methods[name].search | ranges)
        methods[name].check(f"compare.methods.{name}")
    if compare.reference not in methods:
        raise RecipeError(
            f"compare.reference: {compare.reference!r} is no method here."
            f"{nearest(compare.reference, list(methods))} Methods: {', '.join(methods)}."
        )
    if compare.tuning is None and "tuned_dropout" in methods:
        raise RecipeError(
            "compare.methods: tuned_dropout is what a search finds. Give compare.tuning, or leave it out."
        )
    return methods


def _check_method(plan: Plan, name: str) -> None:
    """Raise [`RecipeError`] for settings of a method that its run would refuse."""
    where, method = f"compare.methods.{name}", plan.methods[name]
    if wrong := next((key for key in (*OF_A_RUN, *REFUSED) if key in method.train), None):
        raise RecipeError(f"{where}.train.{wrong}: is the comparison's to set. Leave it out.")
    with refused_as_recipe(where):
        try:
            made = make_settings(plan.run_recipe(plan.settings(name), str(plan.folder / "run"), 0))
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
    held = [patch.name for patch in made.patches if patch.seam == "dropout"]
    if held and method.dropout is not None:
        raise RecipeError(f"{where}: dropout and the patch {held[0]} both set the model's dropout. Give one of them.")


def read_plan(source: Path | Mapping[str, Any], changes: Sequence[str] = (), **given: Any) -> Plan:
    """The comparison that a recipe describes.

    Args:
        source (`Path` or mapping): the recipe.
        changes (sequence of `str`): as `--set` takes them.
        given: values of the section `compare` by key, or of the recipe by a key with dots.

    Raises:
        [`RecipeError`]: for all that is wrong with it as far as it can be told without loading anything.
    """
    _check_packages()
    tree = read_tree(source, changes)
    for key, value in given.items():
        put(tree, key if "." in key else f"compare.{key}", value, key)
    section = tree.pop("compare", None) or {}
    if isinstance(section, Mapping) and section.get("tuning") == "none":
        section = {**section, "tuning": None}
    if isinstance(tree.get("train"), dict):
        folder = section.get("folder") if isinstance(section, Mapping) else None
        tree["train"].setdefault("output_dir", folder or "comparison")
    recipe = make_recipe(tree)
    for key in ("patches", "penalties"):
        if getattr(recipe, key) is not None:
            raise RecipeError(
                f"{key}: here methods regularize. Move it to one: compare: {{methods: {{mine: {{{key}: ...}}}}}}."
            )
    if wrong := next((key for key in REFUSED if recipe.train.get(key)), None):
        raise RecipeError(f"train.{wrong}: has no place in a comparison; {REFUSED[wrong]}.")
    if recipe.data.eval is None:
        raise RecipeError("data.eval: missing. A comparison is made on held-out data; give them.")
    compare = read_section(Compare, section, "compare")
    plan = Plan(recipe, compare, _methods(recipe, compare))
    for name in plan.methods:
        _check_method(plan, name)
    return plan
