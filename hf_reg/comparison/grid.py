"""Jobs of a comparison on several processes; each is a worker of its own, and dies with this one."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


__all__ = ["Answer", "Job", "Workers"]


@dataclass(frozen=True)
class Job:
    """Something for a worker to do; `order` is what it is sent, `name` how messages call it."""

    name: str
    order: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a worker said of a job: `trial`, `done` or `failed`, and after how many seconds."""

    job: Job
    said: dict[str, Any]
    seconds: float


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    job: Job | None = None
    began: float = 0.0

    def send(self, value: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(value).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it has died, which its silence tells

    def give(self, job: Job) -> None:
        self.job, self.began = job, time.monotonic()
        self.send(job.order)


class Workers:
    """Processes that are started when there is something to do, and end with the `with` block.

    Args:
        plan (`dict`): the recipe, as plain values.
        processes (`int`): how many run at a time.
        log (`Path`): what they print is added to it.
    """

    def __init__(self, plan: dict[str, Any], processes: int, log: Path) -> None:
        self.plan, self.processes, self.log = plan, processes, log
        self.heard: queue.Queue[tuple[_Worker, bytes]] = queue.Queue()
        self.workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in list(self.workers):
            self._end(worker)

    def _environment(self) -> dict[str, str]:
        count = str(self.plan["compare"]["threads"])
        return {
            **os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count,
            "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }  # fmt: skip

    def _start(self) -> _Worker:
        command = [sys.executable, "-m", "hf_reg.comparison.worker"]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=self._environment()
            )
        worker = _Worker(process)
        self.workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        worker.send(self.plan)
        return worker

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self.heard.put((worker, line))
        self.heard.put((worker, b""))

    def _end(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.process.kill()  # it holds nothing that it would have to write
        worker.process.wait()

    def run(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        """Every answer as it comes; jobs are begun in their order, and the iterator ends with the last one."""
        waiting, running = deque(jobs), 0
        while waiting or running:
            while waiting and running < self.processes:
                idle = next((worker for worker in self.workers if worker.job is None), None)
                (idle or self._start()).give(waiting.popleft())
                running += 1
            worker, line = self.heard.get()
            if line.endswith(b"\n"):
                said = json.loads(line)
            else:
                said = {"failed": self._death(worker)}
                self._end(worker)
            if (job := worker.job) is None:  # it died between jobs
                continue
            if "trial" not in said:
                worker.job = None
                running -= 1
            yield Answer(job, said, time.monotonic() - worker.began)

    def _death(self, worker: _Worker) -> str:
        code = worker.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"its process {how}, perhaps for want of memory; {self.log} has what it printed."
