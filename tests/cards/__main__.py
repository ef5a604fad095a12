"""`python -m tests.cards`: render model_cards/ again; with `--train`, from new smoke runs of the examples."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from .reference import CARDS, REFERENCES, record, render


parser = argparse.ArgumentParser(prog="python -m tests.cards", description=__doc__)
parser.add_argument("--train", action="store_true", help="Run the examples again and keep their facts.")
train = parser.parse_args().train
for name in REFERENCES:
    if train:
        with tempfile.TemporaryDirectory() as folder:
            (CARDS / f"{name}.json").write_text(record(name, Path(folder)).to_json(), encoding="utf-8")
    (CARDS / f"{name}.md").write_text(render(name), encoding="utf-8")
    print(CARDS / f"{name}.md")
