"""The rows of a cell: labelled samples that grow with their size, a validation split, and texts to probe."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..runs.data import load_data
from ..runs.errors import RunError
from .plan import Plan


__all__ = ["Samples", "draw_order"]

VALIDATION = 2310, 0.2, 500  # seed, which no run's seed changes; fraction, and at most so many rows: we chose them
PROBES = 100


def draw_order(labels: Sequence[Any] | None, count: int, seed: int) -> list[int]:
    """Row numbers in an order whose every beginning is a sample.

    With labels, each beginning has the classes in about their proportions, and one of each as soon as there is room:
    the i-th row of a class of n comes at i/n. So a smaller sample is part of a larger one.
    """
    draw = random.Random(seed)
    order = list(range(count))
    draw.shuffle(order)
    if labels is None:
        return order
    groups: dict[Any, list[int]] = {}
    for row in order:
        groups.setdefault(labels[row], []).append(row)
    placed = [(i / len(rows), draw.random(), row) for rows in groups.values() for i, row in enumerate(rows)]
    return [row for *_, row in sorted(placed)]


def _digest(rows: Any) -> str:
    """Of the contents of a data set."""
    found = hashlib.sha256(json.dumps(rows.column_names).encode())
    for batch in rows.iter(batch_size=1000):
        found.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _as_classes(data: dict[str, Any], column: str) -> dict[str, Any]:
    """The column with all classes of the training data in its type, so that small samples know of them too."""
    from datasets import ClassLabel

    feature = data["train"].features[column]
    inner = getattr(feature, "feature", None)
    if hasattr(inner or feature, "names"):
        return data
    values = data["train"][column]
    found = sorted({one for value in values for one in (value if inner is not None else [value])})
    label = ClassLabel(names=[str(one) for one in found])
    ids = {one: index for index, one in enumerate(found)}

    def encode(value: Any) -> Any:
        return [ids[one] for one in value] if inner is not None else ids[value]

    made = {}
    for key, rows in data.items():
        try:
            encoded = [encode(value) for value in rows[column]]
        except KeyError as error:
            raise RunError(f"data.{key}: the column {column!r} has {error}, which data.train has not.") from error
        features = rows.features.copy()
        features[column] = type(feature)(label) if inner is not None else label
        made[key] = rows.remove_columns(column).add_column(column, encoded).cast(features)
    return made


def _words(value: Any) -> Iterable[str]:
    """The texts in a cell of a table: itself, words of a list, or what was said in a conversation."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _words(value.get("content"))
    elif isinstance(value, list):
        for one in value:
            yield from _words(one)


@dataclass(frozen=True)
class Samples:
    """The data of a comparison, loaded: what is learned from, and what is measured on.

    Args:
        pool (`Dataset`): the train split without the validation rows.
        held_out (`Dataset`): what cells are measured on.
        validation (`Dataset`, *optional*): what trials of the search are judged by.
        probes (`list[str]`): texts that show what is forgotten.
        label (`str`, *optional*): the column that samples are stratified by.
    """

    pool: Any
    held_out: Any
    validation: Any
    probes: list[str]
    label: str | None

    @classmethod
    def load(cls, plan: Plan) -> Samples:
        """The data that the recipe names.

        Raises:
            [`RunError`]: for data that cannot be read, or are too few.
        """
        with _without_bars():
            return cls._load(plan)

    @classmethod
    def _load(cls, plan: Plan) -> Samples:
        facts, compare = plan.facts, plan.compare
        data = load_data(plan.recipe.data, plan.recipe.COLUMNS)
        for key, rows in data.items():
            own = [name for name in (*plan.recipe.COLUMNS, *plan.recipe.OPTIONAL_COLUMNS) if name in rows.column_names]
            data[key] = rows.select_columns(own)
        if facts.classes is not None:
            data = _as_classes(data, facts.classes)
        train, validation = data["train"], None
        if compare.tuning is not None:
            seed, fraction, most = VALIDATION
            given = compare.tuning.validation
            wanted = min(fraction * len(train), most) if given is None else given
            count = round(wanted * len(train)) if 0 < wanted <= 1 and isinstance(given, float) else round(wanted)
            if not 1 <= count < len(train):
                raise RunError(f"compare.tuning.validation: {count} rows of {len(train)} to train on; give fewer.")
            order = draw_order(train[facts.label] if facts.label else None, len(train), seed)
            validation, train = _part(train, order[:count]), _part(train, order[count:])
        probes = _probes(plan, data["eval"])
        found = cls(train, data["eval"], validation, probes, facts.label)
        for size in [*compare.sizes, *([compare.tuning.size] if compare.tuning and compare.tuning.size else [])]:
            found.count(size)
        return found

    def count(self, size: int | float) -> int:
        """How many rows a size is."""
        count = size if isinstance(size, int) else max(round(size * len(self.pool)), 1)
        if count > len(self.pool):
            kept = f" ({len(self.validation)} rows are kept for the search)" if self.validation is not None else ""
            raise RunError(f"compare.sizes: {size} examples of {len(self.pool)} to train on{kept}; give fewer.")
        return count

    def sample(self, size: int, seed: int) -> Any:
        """The labelled examples of a cell."""
        labels = self.pool[self.label] if self.label else None
        return _part(self.pool, draw_order(labels, len(self.pool), seed)[:size])

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that cells see."""
        parts = [_digest(self.pool), _digest(self.held_out), json.dumps(self.probes)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @cached_property
    def validation_fingerprint(self) -> str:
        """Of everything that trials see."""
        return hashlib.sha256(f"{_digest(self.pool)}{_digest(self.validation)}".encode()).hexdigest()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the bars of datasets, of which there would be one for each small step."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def _part(rows: Any, numbers: Sequence[int]) -> Any:
    return rows.select(numbers).flatten_indices(keep_in_memory=True)


def _probes(plan: Plan, held_out: Any) -> list[str]:
    probe = plan.compare.probe
    if probe is None:
        rows, columns, most = held_out, plan.facts.text, PROBES
    else:
        data = replace(plan.recipe.data, train=probe.file, eval=None, name=None, package=None, columns={})
        rows, columns, most = load_data(data, (probe.column,))["train"], (probe.column,), probe.rows
    columns = tuple(name for name in columns if name in rows.column_names)
    chosen = _part(rows, draw_order(None, len(rows), VALIDATION[0])[:most])
    texts = [" ".join(word for name in columns for word in _words(row[name])) for row in chosen]
    found = [text for text in texts if text.strip()]
    if not found:
        raise RunError("compare.probe: there is no text in it. Give a file of texts.")
    return found
