"""`hf-reg inspect MODEL`: what each method would reach in a model, from its configuration alone."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..description import Row, describe
from ..json_text import check_size
from ..patching import known_patches, make_patch, patched
from ..runs.errors import RunError, one_line, refused_as_run
from ..runs.models import with_adapter
from ..runs.recipe import Model
from ..sites.attention import AttentionSite, find_attention, find_uncovered
from ..tables import Shown


__all__ = ["AdapterRow", "Inspection", "build_empty", "inspect_model", "read_config", "trial_settings"]

ADAPTERS = {  # adapters by the modules they take: which, and what peft is asked for
    "lora": ("its defaults for this model type", None),
    "lora, sorsa, balora": ("all-linear", "all-linear"),
}

NEEDED = {"head_mask": "any heads"}  # methods without defaults, and with what they are tried
TASKS = {  # peft's name of what a class is for: it trains the head of some whole
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class AdapterRow:
    """Which linear modules an adapter would take."""

    adapter: str
    target_modules: str
    modules: int
    names: dict[str, int]  # by their last name


@dataclass(frozen=True)
class Inspection(Shown):
    """What [`inspect_model`] found out.

    Attributes:
        model (`str`): the name that was given.
        architecture (`str`): the class that was built, without weights.
        model_type (`str`): of the configuration.
        chosen (`str`): why it is this class.
        rows (`list[Row]`): a row per method and sub-model, as [`describe`] gives it for the patched model.
        refused (`dict[str, str]`): methods that cannot be used here, and why.
        attention (`int`): how many attention modules can be patched.
        uncovered (`dict[str, int]`): token-mixing modules that no patch can reach, by class.
        adapters (`list[AdapterRow]`): which linear modules adapters would take.
    """

    model: str
    architecture: str
    model_type: str
    chosen: str
    rows: list[Row]
    refused: dict[str, str]
    attention: int
    uncovered: dict[str, int]
    adapters: list[AdapterRow]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for machines."""
        kept = ("method", "settings", "submodel", "patched", "found", "backend", "notes")
        rows = [{key: getattr(row, key) for key in kept} for row in self.rows]
        return {**asdict(self), "rows": rows}

    def _table(self) -> RenderableType:
        table = Table(title=f"{self.model}: {self.architecture} ({self.model_type})", title_justify="left")
        for name in ("method", "sub-model", "would patch / found", "backend", "notes"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            method = f"{row.method} ({NEEDED[row.method]})" if row.method in NEEDED else row.method
            table.add_row(method, row.submodel, f"{row.patched} / {row.found}", row.backend, row.notes)
        for name, reason in self.refused.items():
            table.add_row(name, "", "0", "", Text(reason))
        adapters = Table(title="adapters", title_justify="left")
        for name in ("adapter", "target_modules", "modules", "of them"):
            adapters.add_column(name, overflow="fold")
        for one in self.adapters:
            names = ", ".join(f"{count} x {name}" for name, count in one.names.items())
            adapters.add_row(one.adapter, one.target_modules, str(one.modules), names)
        lines = [f"{self.attention} attention modules can be patched. {self.chosen}"]
        if self.uncovered:
            names = ", ".join(f"{count} x {name}" for name, count in self.uncovered.items())
            lines.append(f"Out of reach, runs unregularized: {names}.")
        return Group(table, Text("\n".join(lines)), *([adapters] if self.adapters else []))


def read_config(model: Model) -> Any:
    """The configuration of a model in a folder or on the Hub; code that comes with it is never run.

    Raises:
        [`RunError`]: if there is none, or none that the installed transformers knows.
    """
    revision = model.revision or "main"
    with refused_as_run(f"the configuration of {model.name} cannot be read", (Exception,)):  # classes of its own
        if (path := Path(model.place) / "config.json").is_file():
            check_size(path)
        said, _ = PreTrainedConfig.get_config_dict(model.place, revision=revision)
        if not said:
            raise RunError(f"the configuration of {model.name} cannot be read: it has no config.json.")
        kind = said.get("model_type")
        if kind not in CONFIG_MAPPING:
            found = f"is {kind!r}" if kind else "is missing"
            own = " Its code comes with the model, and such code is never run." if "auto_map" in said else ""
            raise RunError(
                f"the configuration of {model.name}: model_type {found}, which transformers "
                f"{transformers.__version__} does not know.{own} Give a model of a type that it knows."
            )
        return AutoConfig.from_pretrained(model.place, revision=revision, trust_remote_code=False)


def _class_of(config: Any) -> tuple[type[PreTrainedModel] | None, str]:
    """The class that the configuration names, if transformers has it; and why it is taken."""
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    names = list(config.architectures or ())
    for name in names:
        cls = getattr(transformers, name, None)
        if cls is None and module.startswith("transformers."):
            cls = getattr(__import__(module, fromlist=[name]), name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls, "The class is the one that config.json names."
    said = f"names {', '.join(names)}, which transformers does not have" if names else "names no class"
    return None, f"config.json {said}: this is the model that AutoModel makes of it."


def build_empty(config: Any) -> tuple[PreTrainedModel, str]:
    """The model of a configuration without weights, and why it is of this class.

    Raises:
        [`RunError`]: if the configuration makes no model.
    """
    cls, chosen = _class_of(config)
    make = AutoModel.from_config if cls is None else cls._from_config
    with refused_as_run(f"no model can be made of the configuration ({type(config).__name__})", (Exception,)):
        try:
            with torch.device("meta"):
                return make(config), chosen
        except (RuntimeError, NotImplementedError):  # it computes something from tensors while it is made
            with init_empty_weights(include_buffers=False):
                return make(config), chosen


def _adapters(model: PreTrainedModel) -> list[AdapterRow]:
    rows = []
    task = next((task for ending, task in TASKS.items() if type(model).__name__.endswith(ending)), None)
    for name, (said, targets) in ADAPTERS.items():
        if targets is None and model.config.model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            rows.append(AdapterRow(name, "peft has no defaults for this model type: name them", 0, {}))
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.device("meta"):
                    adapted = with_adapter(model, LoraConfig(r=1, target_modules=targets, task_type=task))
        except RunError as error:
            rows.append(AdapterRow(name, f"{said}: {one_line(error)}", 0, {}))
            continue
        taken = [path for path, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)]
        rows.append(AdapterRow(name, said, len(taken), dict(Counter(path.rsplit(".", 1)[-1] for path in taken))))
        adapted.unload()
    return rows


def trial_settings(name: str, sites: list[AttentionSite]) -> dict[str, Any]:
    """What a method without defaults is tried with: of `head_mask`, the first head of every layer."""
    if name != "head_mask":
        return {}
    return {"heads": {layer: (0,) for layer in sorted({site.layer for site in sites if not site.cross}) or (0,)}}


def _rows(model: nn.Module, sites: list[AttentionSite]) -> tuple[list[Row], dict[str, str]]:
    """What `patch_model` does to this very model, method by method."""
    rows: list[Row] = []
    refused = {}
    for name in known_patches():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is out of reach is shown
                with patched(model, make_patch(name, **trial_settings(name, sites))):
                    rows += describe(model).rows  # type: ignore[attr-defined]
        except (ValueError, TypeError) as error:
            refused[name] = one_line(error)
    return rows, refused


def inspect_model(model: str, revision: str | None = None) -> Inspection:
    """What each method would patch in `model`, and what is out of reach. Weights are neither read nor made.

    Args:
        model (`str`): a folder or a name on the Hub, of which the configuration alone is read.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Returns:
        [`Inspection`]: `print` it for tables.

    Raises:
        [`RecipeError`]: for a folder that is not there. [`RunError`]: for a configuration that makes no model.
    """
    named = Model(name=model, revision=revision)
    named.check("MODEL")
    built, chosen = build_empty(read_config(named))
    sites = find_attention(built)
    uncovered = find_uncovered(built, sites)
    rows, refused = _rows(built, sites)
    kind = getattr(built.config, "model_type", "")
    return Inspection(
        model, type(built).__name__, kind, chosen, rows, refused, len(sites), uncovered, _adapters(built)
    )
