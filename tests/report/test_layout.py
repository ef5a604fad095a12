"""Every text of every figure lies within it and upon no other text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.text import Text
from transformers import BertConfig, BertModel, T5Config, T5Model

from hf_reg import patch_model, report
from hf_reg.schedules import SCHEDULES

from .folders import METHODS, cell, write_folder


LONG = {"tlm": "a name that is much longer than all the others are", "drophead": "$W^x and another long name_of_it"}
TOKENS = [f"[{word}]-and-more" for word in "the quick brown fox jumps over the lazy dog and runs".split()]
HISTORY = cell("tlm", 0, 0.0, 100, 0)["history"]
BINS = cell("tlm", 0, 0.0, 100, 0)["calibration"]
TERMS = ["task", "l2_sp", "r_drop", "confidence", "svd_concentration"]
LOGS = [
    {"step": step, "loss": 1.0, **{f"loss_{name}": 0.2 * i + 0.1 for i, name in enumerate(TERMS)},
     **{f"share_{name}": 0.2 for name in TERMS}}
    for step in range(1, 9)
]  # fmt: skip
PAIRS = [
    {"step": step, **{prefix + key: value * step for prefix in ("", "eval_") for key, value in (
        ("logps/chosen", -1234.5), ("logps/rejected", -2345.6),
        ("rewards/chosen", 0.001), ("rewards/rejected", -0.002),
        ("rewards/margins", 0.003), ("rewards/accuracies", 0.1), ("loss_dpo", 0.69), ("loss_sft", 123.4),
    )}}
    for step in range(1, 9)
]  # fmt: skip


def bert() -> Any:
    sizes = {"hidden_size": 24, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 4}
    return patch_model(BertModel(BertConfig(vocab_size=9, **sizes)), "drophead", schedule="v_shape")


def t5() -> Any:
    return patch_model(
        T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=9)), "drophead"
    )


def weights(seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        f"model.encoder.layers.{i}.self_attention.query.weight": torch.randn(6, 5, generator=made) for i in range(5)
    }


FIGURES: dict[str, Callable[[Path], Any]] = {
    "mask": lambda _: report.tlm_mask(TOKENS, {"rate": 0.3}, padding=1, seed=3),
    "mask, short": lambda _: report.tlm_mask(["a", "b", "c"], {"rate": 0.5}, seed=4),
    "mask, long": lambda _: report.tlm_mask([f"t{i}" for i in range(64)], causal=True),
    "heads": lambda _: report.head_drops(bert(), steps=5),
    "heads, few": lambda _: report.head_drops(t5(), steps=5),
    "schedules": lambda _: report.schedule_curves(list(SCHEDULES), 100, evaluations=[(50, 1.0)]),
    "learning": lambda folder: report.learning_curves(folder),
    "differences": lambda folder: report.difference_plot(folder),
    "costs": lambda folder: report.step_costs(folder),
    "losses": lambda _: report.loss_curves({LONG.get(name, name): HISTORY for name in METHODS}, title="x" * 90),
    "losses of one": lambda _: report.loss_curves(HISTORY, title="one run"),
    "reliability": lambda _: report.reliability({LONG.get(name, name): BINS for name in METHODS}, title="25 examples"),
    "reliability of one": lambda _: report.reliability(BINS),
    "reliability of two": lambda _: report.reliability({"a": BINS, "b": BINS}),
    "penalties": lambda _: report.penalty_shares(LOGS),
    "preferences": lambda _: report.preference_curves(PAIRS),
    "spectra": lambda _: report.singular_values(weights(0), weights(1)),
    "spectrum": lambda _: report.singular_values(weights(0), weights(1), most=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = (25, 50, 100, 200, 400)
    return write_folder(tmp_path_factory.mktemp("c"), sizes=sizes, seeds=2, names=LONG, measures=("accuracy",))


@pytest.mark.parametrize("name", FIGURES)
def test_texts_have_room(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = FIGURES[name](folder)
    figure.canvas.draw()  # lays it out
    drawn: list[Text] = []
    draw = Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, *args, **kwargs: (drawn.append(self), draw(self, *args, **kwargs)))
    figure.draw(renderer := figure.canvas.get_renderer())
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in drawn if text.get_text().strip()]
    assert len(boxes) > 8
    width, height = figure.bbox.size
    for said, box in boxes:
        assert min(box.x0, box.y0) > -1 and box.x1 < width + 1 and box.y1 < height + 1, f"{said!r} is cut off"
    for (one, box), (other, there) in combinations(boxes, 2):
        across = min(box.x1, there.x1) - max(box.x0, there.x0)
        down = min(box.y1, there.y1) - max(box.y0, there.y0)
        assert min(across, down) < 2, f"{one!r} lies upon {other!r}"
