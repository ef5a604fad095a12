"""A comparison in words and tables: what its report says, before it is laid out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import floor, log10
from statistics import mean
from typing import Any

from .reading import VERDICTS, Results


__all__ = ["answer", "costs", "facts", "limits", "penalties", "progress", "question", "table", "trials"]

BETTER, WORSE, NONE = VERDICTS
SIGNS = {BETTER: "▲", WORSE: "▼", NONE: "○"}


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _decimals(results: Results, measure: str) -> int:
    """So that the largest mean has four digits, as 0.9123 and 1.234 have; from none to six behind the point."""
    largest = max(
        (abs(row["mean"]) for (_, _, own), row in results.rows.items() if own == measure and row["n"]), default=1
    )
    return min(max(3 - floor(log10(largest)), 0), 6) if largest else 3


def _probability(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _interval(one: dict[str, Any], digits: int, sign: str = "") -> str:
    if one.get("low") is None or one.get("high") is None:
        return ""
    return f"[{one['low']:{sign}.{digits}f}, {one['high']:{sign}.{digits}f}]"


def question(results: Results) -> str:
    """What was asked."""
    sizes, seeds = results.sizes, len(results.summary["seeds"])
    many = f"{sizes[0]} to {sizes[-1]} training examples" if len(sizes) > 1 else f"{sizes[0]} training examples"
    metric = results.measures[results.measure(None)]
    others = len(results.methods) - 1
    return (
        f"Does any of {_count(others, 'method')} fine-tune {results.summary['model']} "
        f"({results.summary['task'].replace('-', ' ')}) better than {results.labels[results.reference]}, with {many}? "
        f"All see the same data and the same {_count(seeds, 'seed')}, with the same budget; the measure is "
        f"{metric.get('label') or metric['name']}."
    )


def progress(results: Results) -> str:
    """How much of the grid is missing, or nothing."""
    missing = results.summary["missing"]
    if not missing:
        return ""
    return (
        f"This comparison is not finished: {missing} of {missing + len(results.cells)} cells are missing. What "
        "follows is about the others and may change. Run the comparison again: it goes on where it stopped."
    )


def answer(results: Results) -> list[str]:
    """What is shown, a sentence or two for each size, in the measure of the task."""
    measure = results.measure(None)
    label = results.measures[measure].get("label") or measure
    digits, reference = _decimals(results, measure), results.labels[results.reference]
    others = [method for method in results.methods if method != results.reference]
    by_size = {size: {m: (results.rows.get((m, size, measure)) or {}).get("difference") for m in others}
               for size in results.sizes}  # fmt: skip
    verdicts = [one["verdict"] for found in by_size.values() for one in found.values() if one]
    if not verdicts:
        return [f"Nothing can be said yet: no method has two seeds in common with {reference}."]
    level = f"at a level of {_percent(results.summary['alpha'])} (Holm's correction over the methods)"
    said = [f"By {label}, against {reference}, {level}:"]
    if all(verdict == NONE for verdict in verdicts):
        none = f"no method is shown to differ from {reference} {level}"
        said = [f"No difference shown: by {label}, {none}, at any size compared."]
    for size, found in by_size.items():
        parts = []
        for verdict, verb in ((BETTER, "better"), (WORSE, "worse")):
            named = [
                f"{results.labels[method]} ({one['mean']:+.{digits}f} {_interval(one, digits, '+')})"
                for method, one in found.items()
                if one and one["verdict"] == verdict
            ]
            if named:
                parts.append(f"{_and(named)} {'is' if len(named) == 1 else 'are'} shown {verb}")
        same = [results.labels[method] for method, one in found.items() if one and one["verdict"] == NONE]
        if same:
            parts.append(f"no difference shown for {_and(same)}")
        if lacking := [results.labels[method] for method, one in found.items() if not one]:
            parts.append(f"not compared yet: {_and(lacking)}")
        said.append(f"With {size} examples, {'; '.join(parts)}.")
    return said


def table(results: Results, measure: str) -> list[dict[str, Any]]:
    """For each size the methods with mean, interval, difference, p and verdict, all as text."""
    digits = _decimals(results, measure)
    found = []
    for size in results.sizes:
        rows = []
        for method in results.methods:
            row = results.rows.get((method, size, measure))
            line = {"method": results.labels[method], "n": 0, "mean": ""}
            line |= {"difference": "", "p": "", "verdict": "no cells yet", "sign": "", "kind": ""}
            if row and row["n"]:
                line["n"] = row["n"]
                line["mean"] = f"{row['mean']:.{digits}f} {_interval(row, digits)}".rstrip()
                line["verdict"] = "reference" if method == results.reference else "not compared"
                if one := row.get("difference"):
                    line["difference"] = f"{one['mean']:+.{digits}f} {_interval(one, digits, '+')}".rstrip()
                    line["p"], line["verdict"] = _probability(one.get("p_holm")), one["verdict"]
                    line["sign"], line["kind"] = SIGNS[one["verdict"]], one["verdict"].split()[0]
            rows.append(line)
        found.append({"size": size, "rows": rows})
    return found


def costs(results: Results) -> list[tuple[str, str, str, str]]:
    """Method, ratio, quartiles and steps, of those whose cost was measured."""
    lines = {line["method"]: line for line in results.costs}
    return [
        (results.labels[m], f"{one['ratio']:.3f}", f"[{one['low']:.3f}, {one['high']:.3f}]", str(one.get("steps", "")))
        for m in results.methods
        if (one := lines.get(m))
    ]


def penalties(results: Results) -> list[tuple[str, str]]:
    """Method, and the mean share of the loss of each of its penalties."""
    found = []
    for method in results.methods:
        shares: dict[str, list[float]] = {}
        for cell in results.cells:
            for name, share in (cell.get("penalties") or {}).items() if cell["method"] == method else ():
                shares.setdefault(name, []).append(share)
        if shares:
            said = ", ".join(f"{name} {_percent(mean(values))}" for name, values in shares.items())
            found.append((results.labels[method], said))
    return found


def _settings(settings: Any) -> str:
    if not settings:
        return ""
    if isinstance(settings, dict):
        return ", ".join(f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={json.dumps(value)}"
                         for name, value in settings.items())  # fmt: skip
    return json.dumps(settings)


def trials(results: Results) -> list[dict[str, str]]:
    """What was tried for each method, and what was chosen."""
    found = []
    for method in results.summary["methods"]:
        own = [trial for trial in results.trials if trial["method"] == method["name"]]
        values = [trial["value"] for trial in own if trial["state"] == "complete" and trial.get("value") is not None]
        early = sum(trial["state"] == "pruned" for trial in own)
        tried: dict[str, list[Any]] = {}
        for trial in own:
            for name, value in trial["params"].items():
                tried.setdefault(name, []).append(value)
        found.append({
            "method": method.get("label") or method["name"],
            "trials": f"{len(own)}, {early} stopped early" if own else "none",
            "tried": "; ".join(f"{name} {_range(all_)}" for name, all_ in tried.items()),
            "best": f"{min(values):.4g}" if values else "",
            "chosen": _settings(method.get("tuned")),
        })  # fmt: skip
    return found


def _range(values: list[Any]) -> str:
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return f"{min(values):.3g}" if min(values) == max(values) else f"{min(values):.3g} to {max(values):.3g}"
    return ", ".join(dict.fromkeys(map(str, values)))


def facts(results: Results) -> dict[str, list[tuple[str, str]]]:
    """Settings of each method, and the run's own facts."""
    summary = results.summary
    own = [
        ("model", str(summary["model"])), ("task", str(summary["task"])),
        ("training examples", ", ".join(map(str, results.sizes))), ("seeds", ", ".join(map(str, summary["seeds"]))),
        ("cells", f"{len(results.cells)} finished, {summary['missing']} missing"),
        *((name, str(version)) for name, version in (summary.get("versions") or {}).items()),
    ]  # fmt: skip
    methods = [(results.labels[one["name"]], _settings(one.get("settings")) or "none") for one in summary["methods"]]
    return {"settings": methods, "run": own}


def limits(results: Results) -> list[str]:
    """What these numbers do not say; then what is to be known of this comparison, as its terminal table says it."""
    seeds = len(results.summary["seeds"])
    tables = len(results.sizes) * len(results.measures)
    found = [
        "One model, one task and one data set: on others the order may be another.",
        f"The spread is that of {_count(seeds, 'seed')} (what a seed decides is in the recipe), not of other data.",
        '"No difference shown" does not say that there is none: the interval says how large it may be.',
        f"p is corrected over the methods of one size and one measure, not over the {tables} such tables of this "
        f"report: of tables without any real difference, {_percent(results.summary['alpha'])} show one by chance.",
        "The intervals are bootstrap intervals of the mean, and each is one for itself, without correction.",
    ]
    searched = {trial["method"] for trial in results.trials}
    tuned = [results.labels[method] for method in results.methods if method in searched]
    fixed = [results.labels[method] for method in results.methods if method not in searched]
    if tuned and fixed:
        found.append(f"{_and(tuned)} had their settings searched for; {_and(fixed)} had not.")
    if results.costs:
        found.append("Step costs are of the machine that measured them, and of this model and batch.")
    return [*found, *results.summary["notes"]]
