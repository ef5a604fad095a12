"""The gradient of a step is that of its whole batch, however it is cut: every head, accumulation, two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from .heads import HEADS, ROWS, WEIGHT, difference, expected, gradients, summed, weight_penalty
from .launch import launch


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("head", HEADS)
def test_one_process(head: str, accumulation: int) -> None:
    plain = gradients(head, ROWS // accumulation, accumulation)[0]
    assert difference(plain, expected(head)) < 1e-6
    penalized = gradients(head, ROWS // accumulation, accumulation, {"weights": (WEIGHT, weight_penalty)})[0]
    assert difference(penalized, expected(head, weight=WEIGHT)) < 1e-6


@pytest.mark.parametrize("head", HEADS)
def test_a_short_last_window(head: str) -> None:
    steps = gradients(head, 2, 4, {"weights": (WEIGHT, weight_penalty)}, count=13, steps=2)
    assert difference(steps[1], expected(head, slice(8, 13), 13, WEIGHT)) < 1e-6


def test_the_plain_trainer_is_wrong() -> None:
    """What the mixin is for; when this fails, transformers has been mended and the mixin may become simpler."""
    found = gradients("classes/bert", 2, 4, trainer=transformers.Trainer)[0]
    wanted = expected("classes/bert")
    assert difference(found, {name: 4 * g for name, g in wanted.items()}) < 1e-6
    ragged = gradients("tags/bert", 2, 4, trainer=transformers.Trainer)[0]
    assert difference(ragged, expected("tags/bert")) > 0.1


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_other_loss_paths(accumulation: int) -> None:
    """compute_loss_func, label smoothing, and a model that takes no loss arguments."""

    penalties = {"weights": (WEIGHT, weight_penalty)}
    wanted = expected("classes/bert", weight=WEIGHT)
    size = ROWS // accumulation
    assert (
        difference(gradients("classes/bert", size, accumulation, penalties, compute_loss_func=summed)[0], wanted)
        < 1e-6
    )
    bare = gradients("tags/bert", size, accumulation, penalties, takes_loss_arguments=False)[0]
    assert difference(bare, expected("tags/bert", weight=WEIGHT)) < 1e-6
    smoothed = {"label_smoothing_factor": 0.1}
    whole = gradients("tokens/llama", ROWS, 1, penalties, arguments=smoothed)[0]
    assert difference(gradients("tokens/llama", size, accumulation, penalties, arguments=smoothed)[0], whole) < 1e-6


def test_two_processes(tmp_path: Path) -> None:
    penalties = {"weights": (WEIGHT, weight_penalty)}
    launch("tests.distributed.heads", str(tmp_path))
    results = torch.load(tmp_path / "gradients.pt")
    assert len(results) == 6 * len(HEADS) + 6 + 2 + 2
    smoothed = gradients("tokens/llama", ROWS, 1, penalties, arguments={"label_smoothing_factor": 0.1})[0]
    paths = {
        "function": expected("classes/bert", weight=WEIGHT), "smoothing": smoothed,
        "no arguments": expected("tags/bert", weight=WEIGHT),
        "short tags/bert": expected("tags/bert", slice(8, 12), 12, WEIGHT),
        "short tokens/llama": expected("tokens/llama", slice(8, 12), 12, WEIGHT),
    }  # fmt: skip
    for (head, accumulation, penalized, checkpointed), found in results.items():
        wanted = paths.get(head) or expected(head, weight=WEIGHT if penalized else 0.0)
        assert difference(found, wanted) < 1e-6, (head, accumulation, penalized, checkpointed)
