"""What a card is made of: plain values, read from a trainer, a model or a folder, or given."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..names import nearest


__all__ = ["Facts", "Use", "facts_of"]

Numbers = dict[str, float | list[float]]  # by metric; a list has one value for each seed


@dataclass
class Use:
    """A method as it was used.

    Args:
        kind (`str`): `"patch"`, `"penalty"`, `"companion"`, `"adapter"` or `"loss"`.
        name (`str`): as in the logs.
        settings (`dict[str, str]`): each as Python would read it.
        formula (`str`, *optional*): with the numbers of this run; else that of the method.
        coverage (`str`, *optional*): how much of the model it reached.
        method (`str`, *optional*): name of the method, where it is not `name`: `"custom"` for one of the user's own.
    """

    kind: str
    name: str
    settings: dict[str, str] = field(default_factory=dict)
    formula: str = ""
    coverage: str = ""
    method: str = ""


@dataclass
class Facts:
    """Everything that a card may say. Each field can be given to [`card_of`] and [`write_card`] by name.

    Args:
        name (`str`): title of the card, and name of the model in its `model-index`.
        repo_id (`str`): where the model is, or will be, on the Hub.
        description (`str`): a paragraph of your own under the title.
        architecture, auto_class, pipeline_tag (`str`): model class, the Auto class that loads it, task on the Hub.
        base_model, base_revision (`str`): repository and commit that training began from; never a path.
        base_is_local (`bool`): whether there is a base that has no public name.
        adapter (`str`), num_labels (`int`): `""` for a whole model, else the kind of the adapter; labels of its head.
        methods (list of [`Use`]): what regularized the training.
        training (`dict[str, str]`): settings of the run.
        seeds (list of `int`), versions (`dict[str, str]`), hardware (`str`): of the run.
        results, baseline (`dict[str, float]`): held-out metrics of this model, and of the same run without
            regularization (`baseline_is` says so in your words); a list of values has one for each seed.
        results_from (`str`): which evaluation the results are of.
        final (`dict[str, float]`): the terms of the loss at the last logged step of training.
        evaluated_on (`str`): name of the data the results are on; the first of `datasets` by default.
        history (list of `dict`): the logs of the run, for the curve.
        cost (`float`), cost_against (`str`): time of a step as a multiple of that of `cost_against`, as you measured.
        trainer, reference (`str`): class of the trainer; what a preference run was compared with.
        license, language, datasets, tags: for the metadata.
        limits (list of `str`): sentences that are added to those that follow from the rest.
    """

    name: str = ""
    repo_id: str = ""
    description: str = ""
    architecture: str = ""
    auto_class: str = ""
    pipeline_tag: str = ""
    base_model: str | None = None
    base_revision: str | None = None
    base_is_local: bool = False
    adapter: str = ""
    num_labels: int | None = None
    methods: list[Use] = field(default_factory=list)
    trainer: str = ""
    reference: str = ""
    training: dict[str, str] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    results: Numbers = field(default_factory=dict)
    results_from: str = ""
    baseline: Numbers = field(default_factory=dict)
    baseline_is: str = "the same run without regularization"
    final: dict[str, float] = field(default_factory=dict)
    evaluated_on: str = ""
    history: list[dict[str, float]] = field(default_factory=list)
    cost: float | None = None
    cost_against: str = "the same run without regularization"
    license: str | None = None
    language: str | list[str] | None = None
    datasets: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.methods = [use if isinstance(use, Use) else Use(**use) for use in self.methods]
        for name in ("datasets", "tags", "limits"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else list(value or ()))
        self.seeds = [self.seeds] if isinstance(self.seeds, int) else list(self.seeds)
        self.results, self.baseline = _numbers("results", self.results), _numbers("baseline", self.baseline)
        if self.base_model is not None:
            self.base_is_local = False
        if unknown := sorted(self.baseline.keys() - self.results.keys()):
            raise ValueError(
                f"baseline has {unknown}, which the results of this model have not; they are {sorted(self.results)}. "
                "Give both under the same names."
            )

    def to_json(self) -> str:
        """Text that `from_json` reads."""
        said = {key: value for key, value in asdict(self).items() if value not in (None, "", [], {})}
        return json.dumps(said, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """The facts that `to_json` wrote.

        Raises:
            `ValueError`: for another text.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"These are no facts of a card of this version ({error}). Take the file away.") from error


def _numbers(name: str, values: Mapping[str, Any]) -> Numbers:
    """Plain floats: numpy's would be written as pickled objects."""
    found: Numbers = {}
    for key, value in (values or {}).items():
        try:
            number = [float(one) for one in value] if isinstance(value, (list, tuple)) else float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}[{key!r}] is {value!r}: expected a number, or a list with one a seed.") from error
        found[key.removeprefix("eval_")] = number
    return found


def facts_of(source: Any, **given: Any) -> Facts:
    """Read the facts of `source`; those that are given count more.

    Args:
        source (`Trainer`, `nn.Module`, folder, [`Facts`] or `None`):
            A trainer knows most. Of a folder, what stands in `config.json`, `adapter_config.json`, `hf_reg.json` and
            `trainer_state.json` is read, or what [`write_card`] kept there of an earlier card.
        given: fields of [`Facts`].

    Raises:
        `TypeError`: for another source or a name that is no fact. `ValueError`: for facts that contradict each other.
    """
    from .sources import of_folder, of_model, of_trainer

    names = [one.name for one in fields(Facts)]
    for name in given:
        if name not in names:
            raise TypeError(f"A card has no fact {name!r}.{nearest(name, names)} Facts: {', '.join(names)}.")
    if source is None:
        facts = Facts()
    elif isinstance(source, Facts):
        facts = source
    elif isinstance(source, nn.Module):
        facts = of_model(source)
    elif hasattr(source, "state") and hasattr(source, "args"):
        facts = of_trainer(source)
    elif isinstance(source, (str, os.PathLike)):
        facts = of_folder(Path(source))
    else:
        raise TypeError(f"A card is made of a Trainer, a model or a folder; got {type(source).__name__}.")
    if given.get("base_model", facts.base_model) != facts.base_model:
        given = {"base_revision": None, **given}  # it was that of another base
    return replace(facts, **given)
