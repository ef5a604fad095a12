"""A comparison from its recipe to its report: search, cells, step costs, statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_reg import __version__

from ..files import replacing
from ..json_lines import Lines
from ..names import shown
from ..runs.errors import RecipeError, RunError
from ..tables import terminal
from ..yaml_text import dump_yaml
from .cells import Cell, digest, grid_of, setting_of_all, study_key, tuning_size, versions
from .grid import Job, Workers
from .methods import with_params
from .plan import Plan, read_plan
from .progress import Counter, counting
from .result import Comparison
from .samples import Samples
from .summary import summarize
from .tuning import best_params


__all__ = ["compare", "run_plan"]


def compare(recipe: str | Path | Mapping[str, Any], **changes: Any) -> Comparison:
    """Compare ways to fine-tune: the same data, budget and seeds for each, differences tested.

    Every number but times is the same, bit for bit, whenever the same recipe runs on the same machine. What is
    finished stays in the folder of the comparison, and is not computed again: a run that was stopped goes on.

    Args:
        recipe (`str`, `Path` or `dict`): as of `hf-reg train`, and its section `compare` ([`Compare`]).
        changes:
            Values of that section, such as `sizes=[25, 50]`; of the rest of the recipe by a key with dots, as in
            `**{"train.max_steps": 50}`.

    Returns:
        [`Comparison`]: the summary, which prints as tables; `report.html` is in its `folder`.

    Raises:
        [`RecipeError`]: for a recipe that cannot be run. [`RunError`]: for data or a model that cannot be loaded. A
            run that fails alone is in `failures` of what is returned.

    Example:

    ```python
    found = hf_reg.compare("recipe.yaml", sizes=[25, 50, 100], seeds=10)
    print(found)
    ```
    """
    if not isinstance(recipe, (str, Path, Mapping)):
        raise RecipeError(f"compare: expected the path of a recipe or its values, found {shown(recipe)}.")
    plan = read_plan(Path(recipe) if isinstance(recipe, str) else recipe, **changes)
    return run_plan(plan, terminal())


def _write(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


class _Run:
    """One run of a comparison; see [`run_plan`]."""

    def __init__(self, plan: Plan) -> None:
        self.plan, tree, folder = plan, plan.tree(), plan.folder
        if folder.is_file():
            raise RecipeError(f"compare.folder: {str(folder)!r} is a file. Give a folder.")
        self.samples = Samples.load(plan)
        self.shared = setting_of_all(plan)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "recipe.yaml", f"# hf-reg {__version__}: hf-reg compare recipe.yaml\n" + dump_yaml(tree))
        self.cells, self.trials, self.costs, self.times, self.failed = (
            Lines(folder / f"{name}.jsonl") for name in ("cells", "trials", "costs", "times", "failures")
        )
        self.failures: list[dict[str, Any]] = []
        self.workers = Workers(tree, plan.processes, folder / "log.txt")

    @property
    def sizes(self) -> list[int]:
        return sorted(map(self.samples.count, self.plan.compare.sizes))

    def work(self, size: int) -> float:
        """Of a cell, in steps or in examples: enough to tell what is left."""
        train = self.plan.recipe.train
        steps = train.get("max_steps", -1)
        return float(steps) if steps > 0 else size * float(train.get("num_train_epochs", 3.0))

    def fail(self, job: Job, said: Mapping[str, Any]) -> None:
        record = {"name": job.name, "error": said["failed"], "traceback": said.get("traceback")}
        self.failures.append(record)
        self.failed.append(record)

    # search

    def studies(self) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        """The key and the known trials of each method's search."""
        found = self.trials.read()
        keys = {name: study_key(self.plan, self.samples, self.shared, name) for name in self.plan.methods}
        known = {}
        for name, key in keys.items():
            numbered = {one["number"]: one for one in found if one["key"] == key}
            known[name] = key, [numbered[number] for number in sorted(numbered)]
        return known

    def tune(
        self, studies: dict[str, tuple[str, list[dict[str, Any]]]], counter: Counter
    ) -> dict[str, dict[str, Any]]:
        """The best settings found of each method."""
        tuning = self.plan.compare.tuning
        assert tuning is not None
        size = tuning_size(self.plan, self.samples)
        order = {"kind": "study", "size": size}
        jobs = [
            Job(name, order | {"method": name, "settings": self.plan.settings(name), "done": done})
            for name, (_, done) in studies.items() if len(done) < tuning.trials
        ]  # fmt: skip
        trials = {name: done for name, (_, done) in studies.items()}
        for answer in self.workers.run(jobs):
            name, said = answer.job.name, answer.said
            if "trial" in said:
                record = {"key": studies[name][0], **said["trial"]}
                self.trials.append(record)
                value = "" if record["value"] is None else f", loss {record['value']:.4g}"
                text = f"search {name}, trial {record['number'] + 1}: {record['state']}{value}"
                counter.told(text, len(tuning.seeds) * self.work(size), answer.seconds)
            elif "done" in said:
                trials[name] = said["done"]
            else:
                self.fail(Job(f"search of {name}", answer.job.order), said)
        found = {}
        for name, records in trials.items():
            try:
                if len(records) == tuning.trials:
                    found[name] = best_params(records)
            except RunError as error:
                self.fail(Job(f"search of {name}", {}), {"failed": str(error)})
        return found

    # cells

    def train(self, cells: Sequence[Cell], records: dict[str, dict[str, Any]], counter: Counter) -> None:
        """Finish what is not finished, into `records`."""
        metric = self.plan.compare.metric or next(iter(self.plan.facts.metrics))
        left = {cell.key: cell for cell in cells if cell.key not in records}
        jobs = [
            Job(f"{one.method}, {one.size} examples, seed {one.seed}",
                {"kind": "cell", "key": key, "settings": one.settings, "size": one.size, "seed": one.seed})
            for key, one in left.items()
        ]  # fmt: skip
        for answer in self.workers.run(jobs):
            cell = left[answer.job.order["key"]]
            if "done" not in answer.said:
                self.fail(answer.job, answer.said)
                counter.told(
                    f"{answer.job.name}: failed, {answer.said['failed']}", self.work(cell.size), answer.seconds
                )
                continue
            record = {"key": cell.key, "method": cell.method, "size": cell.size, "seed": cell.seed,
                      "settings": cell.settings, **answer.said["done"]}  # fmt: skip
            self.cells.append(record)
            self.times.append({"key": cell.key, "work": self.work(cell.size), "seconds": answer.seconds})
            records[cell.key] = record
            seen = {name: record["measures"][name] for name in (metric, "eval_loss") if name in record["measures"]}
            told = ", ".join(f"{name} {value:.4g}" for name, value in seen.items())
            counter.told(f"{answer.job.name}: {told}", self.work(cell.size), answer.seconds)

    # step costs

    def measure_costs(self, settings: Mapping[str, dict[str, Any]], console: Console) -> list[dict[str, Any]]:
        """Of the methods that ran; with nothing beside them."""
        compare = self.plan.compare
        if not compare.cost_steps or compare.reference not in settings or len(settings) < 2:
            return []
        size, seed = self.sizes[len(self.sizes) // 2], compare.every_seed[0]
        key = digest([self.shared, self.samples.fingerprint, list(settings), settings, size, seed, compare.cost_steps])
        known = {one["method"]: one for one in self.costs.read() if one["key"] == key}
        if set(known) != set(settings):
            console.print(f"step costs: {compare.cost_steps} steps of each method, side by side")
            job = Job("step costs", {"kind": "costs", "settings": settings, "size": size, "seed": seed})
            for answer in self.workers.run([job]):
                if "done" not in answer.said:
                    self.fail(job, answer.said)
                    return []
                known = {one["method"]: {"key": key, **one} for one in answer.said["done"]}
                for one in known.values():
                    self.costs.append(one)
        return [known[name] for name in settings]


def run_plan(plan: Plan, console: Console) -> Comparison:
    """Run what is not finished of a comparison, and say what all of it shows.

    Args:
        plan ([`Plan`]): what to compare.
        console (`Console`): where progress is told.
    """
    from ..report import write_report

    run, tuning = _Run(plan), plan.compare.tuning
    base = {name: plan.settings(name) for name in plan.methods}
    studies = run.studies() if tuning is not None else {}
    records = {one["key"]: one for one in run.cells.read()}
    trial = len(tuning.seeds) * run.work(tuning_size(plan, run.samples)) if tuning is not None else 0.0
    searched = trial * sum(min(len(done), tuning.trials) for _, done in studies.values()) if tuning else 0.0
    every = sum(map(run.work, run.sizes)) * len(plan.compare.every_seed) * len(base)
    total = every + (trial * tuning.trials * len(base) if tuning is not None else 0.0)
    planned = len(run.sizes) * len(plan.compare.every_seed) * len(base)
    console.print(
        f"{planned} cells ({len(base)} methods, {len(run.sizes)} sizes, {len(plan.compare.every_seed)} seeds) on "
        f"{plan.processes} processes, in {plan.folder}", soft_wrap=True, highlight=False,
    )  # fmt: skip
    with run.workers, counting(console, total, searched) as counter:
        best = run.tune(studies, counter) if tuning is not None else {}
        settings = {
            name: with_params(base[name], best.get(name, {})) for name in base if tuning is None or name in best
        }  # fmt: skip
        cells = grid_of(plan, run.samples, run.shared, settings)
        finished = [cell for cell in cells if cell.key in records]
        if finished:
            console.print(f"{len(finished)} of {planned} cells are finished already", highlight=False)
            counter.skip(sum(run.work(cell.size) for cell in finished))
        run.train(cells, records, counter)
        ran = {cell.method for cell in cells if cell.key in records}
        costs = run.measure_costs({name: one for name, one in settings.items() if name in ran}, console)
    summary = summarize(plan, cells, records, costs, best, [key for key, _ in studies.values()], versions(), planned)
    _write(plan.folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    if records:
        write_report(plan.folder)
    return Comparison(plan.folder, summary, run.failures)
