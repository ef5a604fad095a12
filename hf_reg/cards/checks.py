"""Whether a card is one that the Hub takes, found out without the Hub."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .private import secrets_in
from .tasks import PIPELINE_TAGS


__all__ = ["check_metadata"]

KNOWN = (
    "base_model", "base_model_relation", "co2_eq_emissions", "datasets", "eval_results", "extra_gated_fields",
    "extra_gated_heading", "extra_gated_prompt", "gated", "inference", "language", "library_name", "license",
    "license_link", "license_name", "mask_token", "metrics", "model-index", "model_name", "model_type", "new_version",
    "pipeline_tag", "quantized_by", "tags", "thumbnail", "widget",
)  # fmt: skip
RELATIONS = ("adapter", "finetune", "merge", "quantized")
LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*(\+)?$")
LANGUAGE = re.compile(r"([a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual)$")
LISTS = ("datasets", "metrics", "tags", "language", "base_model")  # a single text is fine too


def check_metadata(text: str) -> list[str]:
    """What is wrong with a model card, in words; an empty list if nothing is.

    Looked at are the metadata as YAML: spelling of the keys, repository ids, license, language, task, tags, and the
    shape and numbers of `model-index`; and the whole text for tokens.

    Args:
        text (`str`): the content of a README.md.

    Returns:
        list of `str`: problems, each with what was found and what is expected.
    """
    problems = [f"The card holds {found}: take it out, and revoke it if it is a token."
                for found in secrets_in(text) if found.startswith("the token")]  # fmt: skip
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return [*problems, "There is no metadata: expected a YAML block between two lines of --- at the top."]
    try:
        data = yaml.safe_load(block.group(2))
    except yaml.YAMLError as error:
        return [*problems, f"The metadata is no YAML that can be read: {' '.join(str(error).split())}"]
    if not isinstance(data, dict):
        return [*problems, f"The metadata is {type(data).__name__}: expected keys with values."]
    return problems + list(_problems(data))


def _problems(data: dict[Any, Any]) -> Iterator[str]:
    for key in data:
        if key not in KNOWN and (near := difflib.get_close_matches(str(key), KNOWN, 1, cutoff=0.8)):
            yield f"{key!r} is no key that the Hub knows; is it {near[0]!r}?"
    for key in LISTS:
        if key in data and not all(isinstance(one, str) and one.strip() for one in _listed(data[key])):
            yield f"{key} is {data[key]!r}: expected a text or a list of texts (quote words such as no)."
    for key in ("base_model", "datasets"):
        for name in _listed(data.get(key)):
            if isinstance(name, str):
                yield from _repo_id(key, name)
    for tag in _listed(data.get("tags")):
        if isinstance(tag, str) and (tag.startswith("base_model:") or secrets_in(tag)):
            yield from _repo_id("tags", tag.rpartition(":")[2])
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        yield f"base_model_relation is {relation!r}: expected one of {', '.join(RELATIONS)}."
    if relation is not None and not data.get("base_model"):
        yield "base_model_relation stands without base_model: name the base model, or leave it out."
    if "library_name" in data and not isinstance(data["library_name"], str):
        yield f"library_name is {data['library_name']!r}: expected a name such as transformers or peft."
    task = data.get("pipeline_tag")
    if task is not None and task not in PIPELINE_TAGS:
        near = difflib.get_close_matches(str(task), PIPELINE_TAGS, 1)
        yield f"pipeline_tag is {task!r}, which is no task of the Hub{f'; is it {near[0]!r}?' if near else '.'}"
    yield from _license(data)
    for language in _listed(data.get("language")):
        if isinstance(language, str) and not LANGUAGE.match(language):
            yield f"language is {language!r}: expected a code such as en, or code, or multilingual."
    if "model-index" in data:
        yield from _model_index(data["model-index"])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _repo_id(key: str, name: str) -> Iterator[str]:
    try:
        validate_repo_id(name)
    except HFValidationError:
        yield f"{key} has {name!r}: expected the id of a repository, OWNER/NAME, and no path of a machine."


def _license(data: Mapping[Any, Any]) -> Iterator[str]:
    for found in _listed(data.get("license")):
        if not isinstance(found, str) or not LICENSE.match(found):
            yield f"license is {found!r}: expected an identifier in small letters, such as apache-2.0, or other."
        elif found == "other" and not data.get("license_name"):
            yield "license is 'other' without license_name (and license_link): give its name."


def _model_index(index: Any) -> Iterator[str]:
    if not isinstance(index, list) or not all(isinstance(model, dict) for model in index):
        yield f"model-index is {type(index).__name__}: expected a list of models with name and results."
        return
    for model in index:
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            yield "model-index: a model lacks its name (a text) or results (a list)."
            continue
        for result in model["results"]:
            parts = result if isinstance(result, dict) else {}
            task, data, metrics = (parts.get(key) for key in ("task", "dataset", "metrics"))
            if not isinstance(task, dict) or not isinstance(task.get("type"), str):
                yield f"model-index of {model['name']}: a result lacks task.type."
            if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in ("type", "name")):
                yield f"model-index of {model['name']}: a result lacks dataset.type or dataset.name."
            if not isinstance(metrics, list) or not metrics:
                yield f"model-index of {model['name']}: a result lacks its list of metrics."
                continue
            for metric in metrics:
                yield from _metric(model["name"], metric)


def _metric(model: str, metric: Any) -> Iterator[str]:
    if not isinstance(metric, dict) or not isinstance(metric.get("type"), str) or "value" not in metric:
        yield f"model-index of {model}: a metric lacks its type or value."
        return
    value = metric["value"]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        yield f"model-index of {model}: {metric['type']} is {value!r}: expected a finite number."
