"""The whole of it, in processes: the same bits again, nothing twice, and what happens to those that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

import hf_reg
from hf_reg.cli import app
from hf_reg.comparison.grid import Job, Workers
from hf_reg.comparison.plan import read_plan
from hf_reg.comparison.running import Runner
from hf_reg.json_lines import Lines

from ..distributed.launch import environment
from .tiny import recipe


SEARCHED = {"trials": 2, "validation": 2, "seeds": [1000]}


def lines(folder: Path, name: str = "cells") -> list[dict[str, Any]]:
    return Lines(folder / f"{name}.jsonl").read()


def by_key(folder: Path) -> dict[str, str]:
    return {one["key"]: json.dumps(one) for one in lines(folder)}


def begun(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "hf_reg.cli", "compare", str(path)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which is ignored where tests run with &
    )  # fmt: skip


def until(condition: Any, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.stdout and process.stdout.read()
        time.sleep(0.02)


def stopped(path: Path, how: signal.Signals, cells: int) -> dict[str, str]:
    """What is finished of a grid that was stopped after so many cells; its children are gone."""
    folder = path.parent / "results"
    process = begun(path)
    until(lambda: len(lines(folder)) >= cells, process)
    children = psutil.Process(process.pid).children()
    os.kill(process.pid, how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 130)
    assert how == signal.SIGKILL or "the same command goes on" in output
    assert children and not psutil.wait_procs(children, timeout=20)[1]
    return by_key(folder)


def test_a_killed_grid_goes_on(tmp_path: Path) -> None:
    path, folder = recipe(tmp_path, methods=["hf_default", "tlm"]), tmp_path / "results"
    finished = stopped(path, signal.SIGKILL, 1)
    before = (folder / "cells.jsonl").read_bytes()
    assert 1 <= len(finished) < 4
    found = hf_reg.compare(path)
    assert (folder / "cells.jsonl").read_bytes().startswith(before) and len(lines(folder)) == 4
    assert found.summary["cells"] == 4 and found.summary["missing"] == 0 and not found.failures
    assert (folder / "report.html").is_file() and "no difference shown" in str(found)
    run = Runner(read_plan(path))  # in another process than the one that wrote them
    for one in lines(folder):
        numbers = run.cell(one["settings"], one["size"], one["seed"])
        assert json.dumps(numbers) == json.dumps({key: one[key] for key in numbers})


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_search_and_grid_go_on_and_come_again(tmp_path: Path, how: signal.Signals) -> None:
    path = recipe(tmp_path, methods=["hf_default", "tlm"], tuning=SEARCHED, processes=2, cost_steps=3)
    folder = tmp_path / "results"
    finished = stopped(path, how, 1)
    trials = (folder / "trials.jsonl").read_bytes()
    found = hf_reg.compare(path)
    assert finished.items() <= by_key(folder).items() and len(lines(folder)) == 4
    assert (folder / "trials.jsonl").read_bytes() == trials and len(lines(folder, "trials")) == 4
    assert {one["method"] for one in found.summary["costs"]} == {"hf_default", "tlm"}
    again = hf_reg.compare(path, folder=str(tmp_path / "again"))
    assert by_key(tmp_path / "again") == by_key(folder)
    timed = ("costs",)
    assert {k: v for k, v in again.summary.items() if k not in timed} == {
        k: v for k, v in found.summary.items() if k not in timed
    }


def test_finished_cells_and_old_ones(tmp_path: Path) -> None:
    path, folder = recipe(tmp_path, methods=["hf_default", "tlm"], seeds=[0]), tmp_path / "results"
    first = hf_reg.compare(path).summary
    other = hf_reg.compare(path, **{"train.max_steps": 3}).summary
    assert len(lines(folder)) == 4 and other["rows"] != first["rows"] and other["cells"] == 2
    written, began = (folder / "cells.jsonl").read_bytes(), time.monotonic()
    done = CliRunner().invoke(app, ["compare", str(path), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["summary"] == first  # and the report is of these cells
    assert (folder / "cells.jsonl").read_bytes() == written
    assert time.monotonic() - began < 30 and json.loads((folder / "summary.json").read_text()) == first


def test_what_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    methods = {"hf_default": None, "mine": {"dropout": {"lora": 0.1}}}
    done = CliRunner().invoke(app, ["compare", str(recipe(tmp_path, methods=methods))])
    assert done.exit_code == 1, done.output
    assert "mine, 4 examples, seed 0 failed: dropout: lora=0.1" in " ".join(done.stdout.split())
    assert "2 cells are missing" in done.stdout
    assert [one["method"] for one in lines(tmp_path / "results")] == ["hf_default", "hf_default"]
    failures = lines(tmp_path / "results", "failures")
    assert [one["name"] for one in failures] == ["mine, 4 examples, seed 0", "mine, 4 examples, seed 1"]
    assert "Traceback" in failures[0]["traceback"]


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    plan = read_plan(recipe(tmp_path))
    jobs = [Job(str(i), {"kind": "cell", "settings": plan.settings("tlm"), "size": 4, "seed": i}) for i in range(2)]
    with Workers(plan.tree(), 1, tmp_path / "log.txt") as workers:

        def kill() -> None:
            while not workers.workers:
                time.sleep(0.01)
            workers.workers[0].process.kill()

        thread = threading.Thread(target=kill)
        thread.start()
        first, second = workers.run(jobs)
        thread.join()
    assert "was killed by signal 9" in first.said["failed"] and "done" in second.said
    assert [first.job.name, second.job.name] == ["0", "1"]


def test_a_worker_ends_with_its_input(tmp_path: Path) -> None:
    """In the middle of a job that takes hours, as when the process that started it is killed."""
    plan = read_plan(recipe(tmp_path, evaluate_every=10**9), **{"train.max_steps": 10**7})
    job = {"kind": "cell", "settings": plan.settings("tlm"), "size": 4, "seed": 0}
    given = "".join(json.dumps(one) + "\n" for one in (plan.tree(), job))
    command = [sys.executable, "-m", "hf_reg.comparison.worker"]
    assert subprocess.run(command, env=environment(), input=given, text=True, timeout=60, check=False).returncode == 0
