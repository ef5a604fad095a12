"""Folders of comparisons as the engine writes them, made of simulated predictions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats


METHODS = {  # label, how much better it predicts (in logits), step cost, trials
    "hf_default": ("HF default dropout", 0.0, 1.0, 0),
    "no_dropout": ("no dropout", -0.02, 0.93, 0),
    "tuned_dropout": ("tuned dropout", 0.1, 1.0, 6),
    "tlm": ("TLM", 0.55, 1.04, 6),
    "drophead": ("DropHead", -0.6, 1.02, 6),
}
MEASURES = {  # label, higher is better
    "accuracy": ("accuracy", True),
    "eval_loss": ("held-out loss", False),
    "gap": ("train-test gap", False),
    "ece": ("calibration error (ECE)", False),
    "drift": ("forgetting (drift)", False),
}
HELD_OUT, STEPS = 300, range(10, 101, 10)


def bins_of(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Ten bins of equal width."""
    place = np.minimum((confidence * 10).astype(int), 9)
    found = []
    for i in range(10):
        inside = place == i
        means = [float(part[inside].mean()) if inside.any() else 0.0 for part in (confidence, right)]
        found.append(
            {"low": i / 10, "high": (i + 1) / 10, "count": int(inside.sum()), "confidence": means[0],
             "accuracy": means[1]}
        )  # fmt: skip
    return found


def cell(method: str, number: int, skill: float, size: int, seed: int) -> dict[str, Any]:
    """One run: two classes, whose logit is known up to noise; the last of three parts of the noise is the method's."""
    shared = np.random.default_rng([size, seed])
    own = np.random.default_rng([size, seed, number + 1])  # 0 at the end would be the stream of `shared`
    margin = 0.6 + 0.35 * np.log2(size / 20) + skill + shared.normal(0, 0.15) + own.normal(0, 0.15)
    logit = shared.normal(margin, 1.2, HELD_OUT) + own.normal(0, 0.3, HELD_OUT)
    sure = 1 / (1 + np.exp(-1.7 * logit))  # over-confident by 1.7
    right = (logit > 0).astype(float)
    bins = bins_of(np.maximum(sure, 1 - sure), right)
    loss = float(-np.log(sure.clip(1e-3)).mean())
    history = []
    for step in STEPS:
        t = step / 100
        train = 0.69 * float(np.exp(-4 * t)) + 0.02 * (1 + number)
        held = loss + (0.69 - loss) * float(np.exp(-7 * t)) - 0.3 * loss * float(np.sin(np.pi * t))
        history.append(
            {"step": step, "train_loss": train, "eval_loss": held, "accuracy": float(right.mean()) * t**0.1}
        )
    ece = sum(b["count"] / HELD_OUT * abs(b["accuracy"] - b["confidence"]) for b in bins)
    measures = {
        "accuracy": float(right.mean()), "eval_loss": loss, "train_loss": history[-1]["train_loss"],
        "gap": loss - history[-1]["train_loss"], "ece": ece, "drift": float(0.1 + 0.002 * size + own.normal(0, 0.01)),
    }  # fmt: skip
    return {
        "schema": 1, "key": f"{number:02x}{size:04x}{seed:02x}".ljust(64, "0"), "method": method, "size": size,
        "seed": seed, "settings": {"patches": {method: {}}}, "measures": measures, "history": history,
        "calibration": bins, "penalties": {},
    }  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    if len(set(values)) < 2:
        return float(values[0]), float(values[0])
    found = stats.bootstrap((values,), np.mean, n_resamples=500, rng=0, method="percentile").confidence_interval
    return float(found.low), float(found.high)


def summary_of(
    cells: list[dict[str, Any]], labels: dict[str, str], missing: int, measures: Sequence[str]
) -> dict[str, Any]:
    sizes, seeds = (sorted({one[name] for one in cells}) for name in ("size", "seed"))
    reference = next(iter(labels))
    at = {(one["method"], one["size"], one["seed"]): one["measures"] for one in cells}
    rows = []
    for measure in measures:
        higher = MEASURES[measure][1]
        for size in sizes:
            tested = []
            for method in labels:
                own = {seed: at[method, size, seed][measure] for seed in seeds if (method, size, seed) in at}
                if not own:
                    continue
                low, high = interval(list(own.values()))
                row: dict[str, Any] = {
                    "method": method, "size": size, "measure": measure, "n": len(own),
                    "mean": float(np.mean(list(own.values()))), "low": low, "high": high, "difference": None,
                    "sd": float(np.std(list(own.values()), ddof=1)) if len(own) > 1 else None,
                }  # fmt: skip
                rows.append(row)
                paired = [own[seed] - at[reference, size, seed][measure] for seed in own
                          if (reference, size, seed) in at]  # fmt: skip
                if method != reference and len(paired) > 1:
                    low, high = interval(paired)
                    p = float(stats.ttest_1samp(paired, 0).pvalue)
                    row["difference"] = {"mean": float(np.mean(paired)), "low": low, "high": high, "p": p}
                    tested.append(row["difference"])
            running = 0.0
            for rank, one in enumerate(sorted(tested, key=lambda one: one["p"])):
                running = max(running, min(1.0, one["p"] * (len(tested) - rank)))
                one["p_holm"] = running
                good = (one["mean"] > 0) == higher
                one["verdict"] = ("better" if good else "worse") if running <= 0.05 else "no difference shown"
    return {
        "schema": 1, "task": "sequence-classification", "model": "tiny-bert", "reference": reference,
        "metric": {"name": "accuracy", "higher_is_better": True}, "sizes": sizes, "seeds": seeds, "alpha": 0.05,
        "methods": [
            {"name": name, "label": label, "settings": {"patches": {name: {"rate": 0.1}}},
             "tuned": {"rate": 0.15, "learning_rate": 5e-05} if METHODS.get(name, ("", 0, 0, 0))[3] else None}
            for name, label in labels.items()
        ],
        "measures": [{"name": n, "label": MEASURES[n][0], "higher_is_better": MEASURES[n][1]} for n in measures],
        "rows": rows, "costs": [], "versions": {"python": "3.11", "torch": "2.13.0", "hf_reg": "0.1.0"},
        "cells": len(cells), "missing": missing,
        "notes": ["Verdicts: of a sign-flip test.", "TLM: the best rate found, 0.3, is near the end."],
    }  # fmt: skip


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_folder(
    folder: Path,
    sizes: Sequence[int] = (25, 100),
    seeds: int = 4,
    leave_out: int = 0,
    names: dict[str, str] | None = None,
    measures: Sequence[str] = ("accuracy", "ece"),
) -> Path:
    """A comparison of the five methods, of which the last `leave_out` cells are missing; `names` renames methods."""
    folder.mkdir(parents=True, exist_ok=True)
    renamed = {method: (names or {}).get(method, method) for method in METHODS}
    cells = [
        cell(renamed[method], number, skill, size, seed)
        for size in sizes
        for seed in range(seeds)
        for number, (method, (_, skill, _, _)) in enumerate(METHODS.items())
    ]
    cells = cells[: len(cells) - leave_out]
    labels = {renamed[name]: label if renamed[name] == name else renamed[name]
              for name, (label, *_) in METHODS.items()}  # fmt: skip
    costs = [
        {"schema": 1, "method": renamed[name], "ratio": ratio, "low": ratio - 0.02, "high": ratio + 0.03, "steps": 30}
        for name, (_, _, ratio, _) in METHODS.items()
    ]
    trials = []
    for name, (_, _, _, count) in METHODS.items():
        for number in range(count):
            pruned, value = number % 2 == 1, 0.5 - 0.02 * number
            trials.append(
                {"schema": 1, "method": renamed[name], "number": number, "params": {"rate": 0.05 * (number + 1)},
                 "values": [{"step": 10, "loss": value + 0.1}, {"step": 20, "loss": value}][: 1 if pruned else 2],
                 "state": "pruned" if pruned else "complete", "value": None if pruned else value}
            )  # fmt: skip
    summary = summary_of(cells, labels, leave_out, measures)
    summary["costs"] = [{key: line[key] for key in ("method", "ratio", "low", "high")} for line in costs]
    write_lines(folder / "cells.jsonl", cells)
    write_lines(folder / "costs.jsonl", costs)
    write_lines(folder / "trials.jsonl", trials)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return folder
