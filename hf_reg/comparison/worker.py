"""A process that runs jobs of a comparison: `python -m hf_reg.comparison.worker`.

A line of JSON on its standard input is a job, the first one the plan; answers are lines on its standard output. When
the input ends, as it does with the process that started it, the worker ends at once.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any


__all__ = ["main"]

Send = Callable[[dict[str, Any]], None]


def _study(runner: Any, job: dict[str, Any], send: Send) -> Any:
    from .tuning import search

    plan, tuning = runner.plan, runner.plan.compare.tuning
    method = plan.methods[job["method"]]
    return search(
        job["method"], method, job["settings"], trials=tuning.trials, seeds=tuning.seeds, done=job["done"],
        learning_rate=float(plan.recipe.train.get("learning_rate", 5e-5)),
        loss=lambda settings, seed, report: runner.loss(settings, job["size"], seed, report),
        note=lambda record: send({"trial": record}),
    )  # fmt: skip


def _run(runner: Any, job: dict[str, Any], send: Send) -> Any:
    if job["kind"] == "cell":
        return runner.cell(job["settings"], job["size"], job["seed"])
    if job["kind"] == "study":
        return _study(runner, job, send)
    from .step_costs import step_costs

    return step_costs(runner, job["settings"], job["size"], job["seed"])


def _serve(jobs: queue.Queue, send: Send) -> None:
    plan = jobs.get()
    import torch
    from datasets import disable_caching, disable_progress_bars
    from transformers.utils import logging

    from ..runs.errors import RunError, UseError, one_line
    from .plan import read_plan
    from .running import Runner

    disable_caching()  # of samples, which would stay on the disk
    disable_progress_bars()
    logging.disable_progress_bar()
    torch.set_num_threads(plan["compare"]["threads"])
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    runner: Runner | None = None
    while True:
        job = jobs.get()
        try:
            if runner is None:
                runner = Runner(read_plan(plan))
                gc.freeze()  # or looking through all modules would take longer than a small cell
            send({"done": _run(runner, job, send)})
        except (UseError, RunError) as error:
            send({"failed": one_line(error), "traceback": traceback.format_exc()})
        except Exception as error:  # of one job: the others go on
            send({"failed": f"{type(error).__name__}: {one_line(error)}", "traceback": traceback.format_exc()})


def main() -> None:
    """Run jobs until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this one decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    jobs: queue.Queue = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    _serve(jobs, send)


def _listen(jobs: queue.Queue) -> None:
    for line in sys.stdin.buffer:
        jobs.put(json.loads(line))
    os._exit(0)  # in the middle of a job too: nobody waits for it


if __name__ == "__main__":
    main()
