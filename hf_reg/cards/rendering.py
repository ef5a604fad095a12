"""Facts as the sentences, tables and lines of code that the template puts together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from ..costs import costs
from .facts import Facts, Use
from .loading import load_own, load_plain
from .methods import cost_of, method_of


__all__ = ["context_of", "title_of"]

NAMES = {"lora": "LoRA", "sorsa": "SORSA", "ba_lora": "BA-LoRA"}
TERMS = ("consistency", "diversity", "covariance", "svd_concentration")  # of BA-LoRA, whose cost holds theirs


def _inline(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def _code(text: str) -> str:
    return f"`{_inline(text).replace('`', chr(39))}`"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(number: float | list[float]) -> str:
    if isinstance(number, list) and len(number) > 1:
        return f"{mean(number):.4g} ± {stdev(number):.2g}"
    return f"{_mean(number):.4g}"


def _mean(number: float | list[float]) -> float:
    return mean(number) if isinstance(number, list) else number


def title_of(facts: Facts) -> str:
    """The given name, or one of what the model is; never that of a folder."""
    base = (facts.base_model or facts.architecture or "A model").rpartition("/")[2]
    names = list(dict.fromkeys(use.name for use in facts.methods))
    return _inline(facts.name) or f"{base} with {_and(names)}" * bool(names) or base


def _opening(facts: Facts) -> str:
    kind = NAMES.get(facts.adapter)
    what = (
        (f"A {kind} adapter" if kind else f"An adapter of PEFT, {_code(facts.adapter)}")
        if facts.adapter
        else "A model"
    )
    what += f" ({_code(facts.architecture)})" if facts.architecture else ""
    if facts.base_model:
        what += f", trained from [{facts.base_model}](https://huggingface.co/{facts.base_model})"
        what += f" (revision {_code(facts.base_revision)})" if facts.base_revision else " (revision not recorded)"
    elif facts.base_is_local:
        what += ", trained from a base model that was loaded from a local folder and has no public name here"
    how = f", by {_code(facts.trainer)}" if facts.trainer else ""
    return f"{what}. It was trained with hf_reg, which regularizes the fine-tuning of Hugging Face models{how}."


def _method(use: Use) -> dict[str, str]:
    known = method_of(use)
    settings = ", ".join(_code(f"{name}={value}") for name, value in use.settings.items() if value != "None")
    return {
        "name": use.name, "kind": use.kind, "summary": known.summary, "formula": use.formula or known.formula,
        "paper": known.paper, "settings": settings, "coverage": use.coverage,
    }  # fmt: skip


def _results(facts: Facts) -> str:
    if not facts.results:
        return "No result on held-out data was recorded, and no baseline was run."
    on = _inline(facts.evaluated_on or next(iter(facts.datasets), "")) or "data that is not named here"
    which = f", {facts.results_from}" if facts.results_from else ""
    seeds = max(len(v) if isinstance(v, list) else 1 for v in facts.results.values())
    many = f"; mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    lines = [f"Held-out data: {on}{which}{many}."]
    if not facts.baseline:
        table = _table(
            ("metric", "this model"), [(_code(name), _value(value)) for name, value in facts.results.items()]
        )
        missing = "**No baseline was run**: nothing here says whether the regularization helped."
        return "\n\n".join([*lines, table, missing])
    rows = []
    for name, value in facts.results.items():
        other = facts.baseline.get(name)
        rest = ("-", "-") if other is None else (_value(other), f"{_mean(value) - _mean(other):+.4g}")
        rows.append((_code(name), _value(value), *rest))
    lines.append(_table(("metric", "this model", "baseline", "difference"), rows))
    lines.append(f"Baseline: {_inline(facts.baseline_is)}.")
    return "\n\n".join(lines)


def _final(facts: Facts) -> str:
    if not facts.final:
        return ""
    rows = [(_code(name), f"{value:.4g}") for name, value in facts.final.items()]
    return "At the last logged step, on training data:\n\n" + _table(("term", "value"), rows)


def _training(facts: Facts) -> str:
    rows = [(_code(name), _code(value)) for name, value in facts.training.items()]
    if facts.seeds:
        rows.append(("seed" if len(facts.seeds) == 1 else "seeds", _code(", ".join(map(str, facts.seeds)))))
    if facts.reference:
        rows.append(("reference", _inline(facts.reference)))
    rows.append(("hardware", _inline(facts.hardware) or "not recorded"))
    if facts.versions:
        rows.append(("versions", _inline(", ".join(f"{name} {v}" for name, v in facts.versions.items()))))
    if not facts.training:
        rows.append(("other settings", "not recorded"))
    return _table(("setting", "value"), rows)


def _cost(facts: Facts) -> str:
    if facts.cost is not None:
        against = _inline(facts.cost_against)
        return f"Cost, as measured: a training step took {facts.cost:.3g} times as long as one of {against}."
    covered = TERMS if any(use.name == "ba_lora" for use in facts.methods) else ()
    lines = []
    for use in facts.methods:
        if (use.kind == "penalty" and use.name in covered) or use.name == "lora":
            continue
        row = cost_of(use)
        found = f"{row.ratio:.3g} times (against: {_inline(row.peer)}; {row.case})" if row else "not measured"
        lines.append(f"- {_code(use.name)}: {found}")
    if all(line.endswith("not measured") for line in lines):
        return "Cost of a training step: not measured." if lines else ""
    conditions = _inline(costs()[0].partition(". ")[0].removeprefix("Measured with "))
    source = f"benchmarks of hf_reg ({conditions})"
    return f"Cost of a training step, not of this run but from the {source}:\n\n" + "\n".join(lines)


def _limits(facts: Facts) -> str:
    found = []
    if not facts.results:
        found.append("It was not evaluated on held-out data: how well it does is not known.")
    if any(isinstance(v, float) and not math.isfinite(v) for v in facts.results.values()):
        found.append("A metric is not finite: the training may have diverged.")
    if len(facts.seeds) == 1:
        found.append("One seed: a difference from other models, or from a baseline, may be chance.")
    if facts.adapter:
        base = (
            f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
            if facts.base_model
            else "its base model"
        )
        found.append(f"It is an adapter: it needs {base}, with the weights that it was trained on.")
    if facts.adapter in ("sorsa", "ba_lora"):
        found.append(
            "`adapter_config.json` shows plain LoRA of twice the rank, which computes the same. To train on, use "
            "hf_reg: it reads the factors as they are."
        )
    if any(use.name == "head_mask" for use in facts.methods):
        found.append("`head_mask` acts in evaluation too: loaded without hf_reg, the masked heads are on again.")
    found.append("Bias, safety and uses beyond the data it was trained on were not examined.")
    return "\n".join(f"- {_inline(one)}" for one in [*found, *facts.limits])


def context_of(facts: Facts, curve: str | None) -> dict[str, Any]:
    """What the template is rendered with; `curve` is the file name of the picture, if there is one."""
    return {
        "title": title_of(facts), "opening": _opening(facts), "description": facts.description.strip(),
        "methods": [_method(use) for use in facts.methods], "results": _results(facts), "final": _final(facts),
        "curve": f"![Loss over the steps of training]({curve})" if curve else "", "training": _training(facts),
        "cost": _cost(facts), "load_plain": load_plain(facts), "load_own": load_own(facts), "limits": _limits(facts),
    }  # fmt: skip
