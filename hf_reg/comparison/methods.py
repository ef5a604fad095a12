"""Methods of a comparison: what each adds to the recipe, and what of it is searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

from ..base import check_range
from ..names import nearest, shown
from ..runs.errors import RecipeError, refused_as_recipe
from ..runs.recipe import put
from ..runs.sections import Section, check_keys, read_section


__all__ = ["KNOWN", "Method", "Range", "read_methods", "with_params"]

KINDS = ("attention", "hidden", "ffn", "lora", "head")  # of dropout
BUDGET = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
TIMES_ADAPTER = 10  # the learning rate of an adapter over that of the whole model: "LoRA Without Regret" (2025)


@dataclass(frozen=True)
class Range(Section):
    """Where the search may look for a setting: from `low` to `high` (`float`; on a logarithmic scale with `log`), or
    among `choices` (`list`)."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: list | None = None

    def check(self, where: str) -> None:
        if self.choices is not None:
            if not self.choices or self.low is not None or self.high is not None or self.log:
                raise RecipeError(f"{where}: give choices, at least one, or low and high.")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise RecipeError(f"{where}: found low {self.low} and high {self.high}; give low below high, or choices.")
        elif self.log and self.low <= 0:
            raise RecipeError(f"{where}: low is {self.low}, which has no logarithm. Give a low above 0.")


@dataclass(frozen=True)
class Method(Section):
    """A way to fine-tune.

    Args:
        label (`str`, *optional*): how tables and figures call it.
        dropout (`float` or `dict`, *optional*):
            One rate for every dropout of the model, or rates by kind as [`set_dropout`] takes them, and `head` for
            those of the task's head. `None`: the model's configuration as it is.
        patches, penalties: as in a recipe.
        adapter (`dict` or `str`, *optional*): in place of the recipe's.
        train (`dict`): training arguments that differ from the recipe's; those of the budget cannot.
        search (`dict`): settings that the search tries ([`Range`]), such as `{patches.tlm.rate: {low: 0, high: 0.5}}`.
    """

    label: str | None = None
    dropout: float | dict | None = None
    patches: dict | str | list | None = None
    penalties: dict | str | list | None = None
    adapter: dict | str | None = None
    train: dict = field(default_factory=dict)
    search: dict = field(default_factory=dict)

    def check(self, where: str) -> None:
        if isinstance(self.dropout, Mapping):
            check_keys(self.dropout, KINDS, f"{where}.dropout")
        rates = self.dropout if isinstance(self.dropout, Mapping) else {"dropout": self.dropout}
        for kind, rate in rates.items():
            if rate is not None:
                with refused_as_recipe(where):
                    check_range("dropout", kind, rate, 0, 1)
        if fixed := next((key for key in BUDGET if key in self.train), None):
            raise RecipeError(f"{where}.train.{fixed}: is the budget, which is the same for all. Give it in train.")
        for key, given in self.search.items():
            if given is not None:
                read_section(Range, given, f"{where}.search.{key}")

    @property
    def ranges(self) -> dict[str, Range]:
        """What is searched, by setting."""
        return {key: read_section(Range, given) for key, given in self.search.items() if given is not None}

    def settings(self, adapter: Any) -> dict[str, Any]:
        """What determines its numbers, as plain values, where the recipe's own adapter is `adapter`."""
        given = {"dropout": self.dropout, "patches": self.patches, "penalties": self.penalties, "train": self.train}
        return deepcopy(given | {"adapter": adapter if self.adapter is None else self.adapter})


RATE = {"low": 0.0, "high": 0.5}
KNOWN: dict[str, dict[str, Any]] = {
    "no_dropout": {"label": "no dropout", "dropout": 0.0},
    "hf_default": {"label": "HF default"},
    "tuned_dropout": {
        "label": "tuned dropout", "dropout": {"hidden": 0.1, "attention": 0.1},
        "search": {"dropout.hidden": RATE, "dropout.attention": RATE},
    },
    "tlm": {"label": "TLM", "patches": {"tlm": {"rate": 0.1}}, "search": {"patches.tlm.rate": RATE}},
    "drophead": {"label": "DropHead", "patches": {"drophead": {"p": 0.2}}, "search": {"patches.drophead.p": RATE}},
    "sorsa": {
        "label": "SORSA", "adapter": {"type": "sorsa", "gamma": 4e-4},
        "search": {"adapter.gamma": {"low": 1e-5, "high": 1e-2, "log": True}},
    },
    "balora": {
        "label": "BA-LoRA", "adapter": {"type": "balora"}, "search": {"adapter.r": {"choices": [8, 16, 32]}},
    },
}  # fmt: skip
ADAPTERS = ("sorsa", "balora")


def _known(name: str, where: str, rate: float, bare: bool) -> dict[str, Any]:
    """The settings of a known method; adapters of a model that is else trained whole learn faster."""
    if name not in KNOWN:
        raise RecipeError(
            f"{where}: {shown(name)} is not known.{nearest(name, list(KNOWN))} Known methods: {', '.join(KNOWN)}; of "
            "one of your own give what it does: methods: {mine: {patches: ...}}."
        )
    faster = {"train": {"learning_rate": TIMES_ADAPTER * rate}} if name in ADAPTERS and bare else {}
    return deepcopy(KNOWN[name]) | faster


def read_methods(
    given: Any, default: Sequence[str], *, learning_rate: float, bare: bool, where: str = "compare.methods"
) -> dict[str, Method]:
    """Methods by name.

    Args:
        given (`list` or `dict`, *optional*): names of known ones, or `{name: settings}`; `None` means `default`.
        default (sequence of `str`): names.
        learning_rate (`float`):
            Of the recipe. A fourth to four times of it is searched, our choice; of a method with a rate of its own,
            from a fourth of the lower to four times its own.
        bare (`bool`): whether the recipe itself has no adapter.

    Raises:
        [`RecipeError`]: for unknown names and settings.
    """
    if given is None:
        given = list(default)
    if isinstance(given, list):
        if wrong := next((one for one in given if not isinstance(one, str)), None):
            raise RecipeError(f"{where}: expected names or a section of keys, found {shown(wrong)} in a list.")
        given = dict.fromkeys(given)
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: expected a list of names or a section of keys, found {shown(given)}.")
    made = {}
    for name, own in given.items():
        place = f"{where}.{name}"
        if own is not None:
            check_keys(own, [one.name for one in fields(Method)], place)
        of_known = own is None or name in KNOWN
        settings = (_known(name, where, learning_rate, bare) if of_known else {}) | dict(own or {})
        base = float(settings.get("train", {}).get("learning_rate", learning_rate))
        searched = {"train.learning_rate": {"low": min(base, learning_rate) / 4, "high": 4 * base, "log": True}}
        settings["search"] = searched | dict(settings.get("search") or {})
        made[name] = read_section(Method, settings, place)
    return made


def with_params(settings: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` of a method with what the search tries, such as `{"patches.tlm.rate": 0.2}`."""
    changed = deepcopy(dict(settings))
    for key in ("patches", "penalties"):
        if isinstance(changed[key], str):
            changed[key] = {changed[key]: {}}
    if isinstance(changed["adapter"], str):
        changed["adapter"] = {"type": changed["adapter"]}
    for key, value in params.items():
        put(changed, key, value, f"search.{key}")
    return changed
