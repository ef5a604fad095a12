"""Settings of the whole test run: offline, one thread, quiet; and the report of the architecture sweep."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers


torch.set_num_threads(1)
transformers.logging.set_verbosity(transformers.logging.CRITICAL)
transformers.utils.logging.disable_progress_bar()

REPORT = Path(__file__).with_name("coverage.json")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # this run's own folder; the workers inherit the variable
        os.environ["HF_REG_SWEEP"] = str(Path(__file__).parent / ".sweep" / str(os.getpid()))


def sweep_folder() -> Path:
    """Where the tests of this run leave what they found, a file per architecture."""
    return Path(os.environ["HF_REG_SWEEP"])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Once, after all workers: gather what the sweep found into coverage.json."""
    if hasattr(session.config, "workerinput") or not sweep_folder().is_dir():
        return
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(sweep_folder().glob("*.json"))}
    shutil.rmtree(sweep_folder())
    from .architectures import MODEL_TYPES

    if set(parts) != set(MODEL_TYPES):  # a few types by hand: not a sweep
        return
    ran = [part for part in parts.values() if part["reached"] or part["ffn"]]
    totals = {
        "transformers": transformers.__version__,
        "model types": len(parts),
        "forward runs": sum(part["forward"] is True for part in parts.values()),
        "patched": len(ran),
        "with attention": sum(bool(part["reached"]) for part in ran),
        "with attention and FFN found": sum(bool(part["reached"] and part["ffn"]) for part in ran),
        "FFN found": sum(bool(part["ffn"]) for part in ran),
        "through the interface": sum("interface" in part["reached"] for part in ran),
        "every property holds": sum(part["complete"] for part in ran),
    }
    REPORT.write_text(json.dumps({"totals": totals, "types": parts}, indent=1, sort_keys=True) + "\n")
