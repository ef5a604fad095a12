"""Metrics of a run's predictions: those of `evaluate` that a recipe asks for, beside the ones of its task."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from numbers import Number
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import constants

from .errors import RecipeError, refused_as_run
from .recipe import Recipe
from .sections import Section


__all__ = ["Metric", "Outputs", "ScoredRecipe", "class_scores", "likeliest", "scoring"]

KEPT = ("evaluate-metric--", "evaluate-comparison--", "evaluate-measurement--", "")  # names of folders in its cache
TEXTS = ("string", "large_string")
TRUE = ("1", "ON", "TRUE", "YES")


@dataclass(frozen=True)
class Outputs:
    """What was predicted and what is true, an item per row.

    Args:
        predictions, references (`list`):
            Ids of classes, a list of them for each row of words; or texts, with a list of true ones for each.
        names (`list[str]`, *optional*): of the classes, by id; `None` for texts.
        answers (`list[dict]`, *optional*): the true answers to a question as SQuAD writes them.
    """

    predictions: list[Any]
    references: list[Any]
    names: list[str] | None = None
    answers: list[dict[str, Any]] | None = None


Scores = Callable[[Outputs], dict[str, float]]


@dataclass(frozen=True)
class Metric(Section):
    """A metric of `evaluate`. It is code, which is run.

    Args:
        name (`str`): a Python script, a folder with a script of its name, or a name on the Hub.
        label (`str`, *optional*): its results are `eval_LABEL/...`. `None`: the last part of `name`.
        config, revision (`str`, *optional*): of the metric, and of its repository on the Hub.
        settings (`dict`, *optional*): what its `compute` takes, such as `{average: macro}`.
    """

    SHORT: ClassVar[str] = "name"

    name: str = field(metadata={"help": "Give a script, or a name on the Hub."})
    label: str | None = None
    config: str | None = None
    revision: str | None = None
    settings: dict = field(default_factory=dict)

    @property
    def script(self) -> Path | None:
        """The script on this machine; `None` for a name on the Hub."""
        path = Path(self.name).expanduser()
        inside = path / f"{path.name}.py"
        return next((one.resolve() for one in (path, inside) if one.suffix == ".py" and one.is_file()), None)

    @property
    def filed(self) -> str:
        """The first part of the names of its results."""
        return self.label or Path(self.name).stem

    def check(self, where: str) -> None:
        if find_spec("evaluate") is None:
            raise RecipeError(f'{where}: evaluate, which metrics need, is not installed: pip install "hf_reg[train]".')
        if self.script is not None:
            return
        path = Path(self.name).expanduser()
        if path.is_dir() or path.suffix == ".py" or self.name.startswith((".", "/", "~")) or self.name.count("/") > 1:
            raise RecipeError(
                f"{where}: {self.name!r} is no script (looked in {Path.cwd()}). Give a Python file, a folder with "
                f"{path.stem}.py in it, or a name on the Hub."
            )
        if _offline() and not _kept(self.name):
            raise RecipeError(
                f"{where}: {self.name!r} is a name on the Hub, but HF_HUB_OFFLINE or HF_EVALUATE_OFFLINE is set, and "
                "the metric is not in the cache. Run once with a connection, or give the path of its script."
            )


def _offline() -> bool:
    return constants.HF_HUB_OFFLINE or os.environ.get("HF_EVALUATE_OFFLINE", "").upper() in TRUE


def _kept(name: str) -> bool:
    """Whether evaluate has the code of a metric of the Hub from an earlier run."""
    modules = Path(os.environ.get("HF_MODULES_CACHE", Path(constants.HF_HOME) / "modules"))
    return any((modules / "evaluate_modules" / "metrics" / f"{k}{name.replace('/', '--')}").is_dir() for k in KEPT)


@dataclass(frozen=True, kw_only=True)
class ScoredRecipe(Recipe):
    """A recipe of a task with predictions, and so with `metrics` (list of [`Metric`])."""

    metrics: list[Metric] = field(default_factory=list)

    def check(self, where: str) -> None:
        super().check(where)
        if self.metrics and self.data.eval is None:
            raise RecipeError("metrics: there is no data.eval to compute them on. Give it.")
        filed = [one.filed for one in self.metrics]
        if twice := next((name for name in filed if filed.count(name) > 1), None):
            raise RecipeError(
                f"metrics: two are named {twice!r}. Give one of them a label: {{name: ..., label: ...}}."
            )

    def further_scores(self, args: Any, trial: Outputs) -> Scores:
        """What computes `metrics`, once they have been computed for `trial`.

        Raises:
            [`RunError`]: for a metric that cannot be loaded, or not computed for such outputs.
        """
        loaded = {one.filed: (_load(one, args), one.settings) for one in self.metrics}

        def scores(outputs: Outputs) -> dict[str, float]:
            found: dict[str, float] = {}
            for name, (metric, settings) in loaded.items():
                with refused_as_run(f"metrics: {name}", (Exception,)):  # code of others
                    result = metric.compute(**_columns(metric.features, outputs), **settings)
                    found |= _numbers(name, result)
            return found

        scores(trial)
        return scores


def scoring(outputs: Callable[[Any], Outputs], *parts: Scores) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics` of a trainer, from what makes [`Outputs`] of its predictions."""

    def compute(prediction: Any) -> dict[str, float]:
        found = outputs(prediction)
        return {name: value for scores in parts for name, value in scores(found).items()}

    return compute


def likeliest(logits: Any, labels: Any) -> Any:
    """The ids of the classes, instead of all logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def class_scores(outputs: Outputs) -> dict[str, float]:
    """Accuracy, and F1 as the mean over classes; of words one by one, not of entities that they make up."""
    from sklearn.metrics import accuracy_score, f1_score

    found, true = _flat(outputs.predictions), _flat(outputs.references)
    macro = f1_score(true, found, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(true, found)), "macro_f1": float(macro)}


def _load(metric: Metric, args: Any) -> Any:
    """Every process computes the metric of all predictions by itself, in memory: no file of one is in another's way.
    With a seed, they agree."""
    with args.main_process_first(desc="metrics"), refused_as_run(f"metric {metric.name}", (Exception,)):
        import evaluate

        evaluate.config.HF_EVALUATE_OFFLINE = _offline()
        settings = {"revision": metric.revision, "keep_in_memory": True, "seed": 0}
        return evaluate.load(str(metric.script or metric.name), metric.config, **settings)


def _flat(values: Sequence[Any]) -> list[Any]:
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def _columns(features: Any, outputs: Outputs) -> dict[str, list[Any]]:
    """Predictions and references in the first form that a metric takes and outputs have."""
    forms = features if isinstance(features, list) else [features]
    for form in forms:
        if set(form) == {"predictions", "references"}:
            made = {key: _column(key, form[key], outputs) for key in form}
            if None not in made.values():
                return {key: list(column) for key, column in made.items() if column is not None}
    kind = "texts" if outputs.names is None else "classes"
    takes = " or ".join(str(dict(form)) for form in forms)
    raise ValueError(f"it takes {takes}, which cannot be made of {kind}")


def _column(key: str, feature: Any, outputs: Outputs) -> list[Any] | None:
    values, names = getattr(outputs, key), outputs.names
    if isinstance(feature, Mapping):
        return _of_squad(key, set(feature), outputs)
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    text = getattr(feature if inner is None else inner, "dtype", None) in TEXTS
    listed = bool(values) and isinstance(values[0], list)
    if (inner is not None and not listed) or (names is None and not text):
        return None
    if names is not None and text:
        values = [[names[i] for i in one] if isinstance(one, list) else names[one] for one in values]
    if inner is not None or not listed:
        return values
    return _flat(values) if names is not None else [(one or [""])[0] for one in values]


def _of_squad(key: str, fields: set[str], outputs: Outputs) -> list[Any] | None:
    """Of the metrics of SQuAD; that nothing is the answer is as a text, so it has no probability."""
    if outputs.answers is None:
        return None
    if key == "references":
        rows = [{"id": str(index), "answers": its} for index, its in enumerate(outputs.answers)]
    else:
        own = {"no_answer_probability": 0.0} if "no_answer_probability" in fields else {}
        rows = [{"id": str(index), "prediction_text": one} | own for index, one in enumerate(outputs.predictions)]
    return rows if set(rows[0]) == fields else None


def _numbers(name: str, value: Any) -> dict[str, float]:
    """The numbers in what a metric returns, by the way to them; texts, such as a version, are left out."""
    return dict(_walk(name, value))


def _walk(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _walk(f"{name}/{key}", one)
    elif hasattr(value, "tolist"):
        yield from _walk(name, value.tolist())
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            yield from _walk(f"{name}/{index}", one)
    elif isinstance(value, Number):
        yield name, float(value)  # type: ignore[arg-type]
