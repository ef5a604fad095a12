"""Metadata for the Hub: that of the facts, and how it joins what is there."""

from __future__ import annotations

import math
import re
from statistics import mean
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .facts import Facts
from .methods import OF_PEFT, OWN, method_of
from .private import repo_id_or_none
from .rendering import title_of


__all__ = ["merge_metadata", "metadata_of"]


def _tags(facts: Facts) -> list[str]:
    known = [(use.method or use.name, method_of(use)) for use in facts.methods]
    names = [name for name, method in known if method.summary and method not in (OWN, OF_PEFT)]
    papers = [f"arxiv:{method.paper}" for _, method in known if method.paper]
    return list(dict.fromkeys(["hf_reg", *names, *papers, *facts.tags]))


def _eval_results(facts: Facts) -> list[EvalResult] | None:
    """None where the task or the data has no name: the Hub has no place for such results."""
    data = facts.evaluated_on or next(iter(facts.datasets), "")
    if not (data and facts.pipeline_tag):
        return None
    kind = data if data in facts.datasets else re.sub(r"[^a-z0-9.]+", "-", data.lower()).strip("-")
    found = []
    for name, value in facts.results.items():
        number = mean(value) if isinstance(value, list) else value
        if math.isfinite(number) and not name.startswith(("loss_", "logps/")):  # terms of the loss are no metrics
            found.append(
                EvalResult(
                    task_type=facts.pipeline_tag,
                    dataset_type=kind,
                    dataset_name=data,
                    metric_type=name,
                    metric_name=name,
                    metric_value=number,
                )  # fmt: skip
            )
    return found or None


def metadata_of(facts: Facts) -> ModelCardData:
    """The metadata of a new card."""
    relation = "adapter" if facts.adapter else "finetune"
    metrics = [name for name in facts.results if not name.startswith("loss") and "/" not in name]
    results = _eval_results(facts)
    more: dict[str, Any] = {"base_model_relation": relation} if facts.base_model else {}
    return ModelCardData(
        base_model=facts.base_model, library_name="peft" if facts.adapter else "transformers",
        pipeline_tag=facts.pipeline_tag or None, license=facts.license, language=facts.language,
        datasets=facts.datasets or None, metrics=metrics or None, tags=_tags(facts), eval_results=results,
        model_name=title_of(facts) if results else None, **more,
    )  # fmt: skip


def _names_no_repo(tag: str) -> bool:
    return tag.startswith("base_model:") and not repo_id_or_none(tag.rpartition(":")[2], revision="any")


def merge_metadata(there: Any, ours: Any) -> None:
    """Bring `ours` into `there`: lists are joined, results of the same metric on the same data replaced, and what
    is not ours stays. A base model that is no repository goes: other libraries leave the paths of a machine there."""
    bases = there.base_model if isinstance(there.base_model, list) else [there.base_model]
    if not all(repo_id_or_none(one, revision="any") for one in bases):
        there.base_model = None
        there.pop("base_model_relation")
    there.tags = [tag for tag in there.tags or () if not _names_no_repo(str(tag))] or None
    for key in ("base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "language"):
        if ours.get(key) is not None:
            there[key] = ours[key]
    for key in ("tags", "datasets", "metrics"):
        old = there.get(key) or []
        joined = [*([old] if isinstance(old, str) else old), *(ours.get(key) or [])]
        there[key] = list(dict.fromkeys(joined)) or None
    if ours.eval_results:
        others = [
            one
            for one in there.eval_results or ()
            if not any(one.is_equal_except_value(new) for new in ours.eval_results)
        ]
        there.eval_results = [*others, *ours.eval_results]
        there.model_name = there.model_name or ours.model_name
