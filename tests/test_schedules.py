"""Schedules: their formulas, their errors, and who drives them."""

from __future__ import annotations

import math

import pytest
import torch

from hf_reg import patch_model
from hf_reg.patches.drophead import DropHead
from hf_reg.schedules import (
    SCHEDULES,
    constant,
    cosine,
    exponential,
    linear,
    make_schedule,
    model_step,
    on_plateau,
    two_phase,
    v_shape,
)
from hf_reg.seams.attention import gates

from .architectures import build


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (constant(0.5), {0: 0.5, 50: 0.5, 100: 0.5}),
        (linear(), {0: 1, 25: 0.75, 100: 0}),
        (linear(0.2, 1.0), {0: 0.2, 50: 0.6, 100: 1}),
        (cosine(1.0, 0.1), {0: 1, 50: 0.55, 100: 0.1}),
        (exponential(k=2.0), {0: 1, 50: math.exp(-1), 100: math.exp(-2)}),
        (v_shape(1.0, 0.8, 0.2), {0: 1, 10: 0.5, 20: 0, 60: 0.4, 100: 0.8}),
        (v_shape(warmup=0.0), {0: 0, 50: 0.5, 100: 1}),
        (v_shape(warmup=1.0), {0: 1, 50: 0.5, 100: 0}),
        (two_phase(), {0: 0, 19: 0, 20: 0, 22.5: 0.5, 25: 1, 100: 1}),
        (two_phase(0.5, 0.0, 2.0), {49: 0, 50: 2, 100: 2}),
    ],
)
def test_formulas(schedule, values) -> None:
    for step, value in values.items():
        assert schedule(step, 100) == pytest.approx(value), (schedule, step)
    assert max(schedule(step, 1000) for step in range(1001)) <= schedule.peak + 1e-12


def test_on_plateau_follows_the_validation_losses() -> None:
    schedule = on_plateau(start=1.0, up=2.0, down=0.5, low=0.25, high=3.0)
    assert schedule(5, 10) == 1.0
    assert schedule(5, 10, [1.0]) == 0.5  # the first is an improvement on nothing
    assert schedule(5, 10, [1.0, 1.1]) == 1.0
    assert schedule(5, 10, [1.0, 1.1, 1.2, 1.3]) == 3.0  # clipped
    assert schedule(5, 10, [1.0, 0.9, 0.8, 0.7]) == 0.25
    assert on_plateau(threshold=0.2)(5, 10, [1.0, 0.9]) > on_plateau()(5, 10, [1.0, 0.9])


@pytest.mark.parametrize("name", SCHEDULES)
def test_by_name(name: str) -> None:
    assert make_schedule(name) == SCHEDULES[name]()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: make_schedule("warm"), ValueError, "Unknown schedule 'warm'; choose one of constant, linear"),
        (lambda: make_schedule(0.5), TypeError, "schedule must be a name"),
        (lambda: linear(-1.0), ValueError, "linear: start=-1.0 must be a finite number >= 0"),
        (lambda: v_shape(warmup=10), ValueError, "warmup=10 must be a fraction"),
        (lambda: on_plateau(up=0.5), ValueError, "up >= 1 >= down"),
        (lambda: linear()(3, 0), ValueError, "total=0"),
        (lambda: DropHead(p=0.6, schedule=linear(1.0, 2.0)), ValueError, "keep it below 1"),
    ],
)
def test_errors(make, error, text) -> None:
    with pytest.raises(error, match=text):
        make()


def test_model_step_drives_the_rates_and_disable_dropout_wins() -> None:
    model = patch_model(build("bert").model, DropHead(p=0.4, schedule=linear()))
    gate = next(iter(gates(model)))
    for step, rate in ((0, 0.4), (5, 0.2), (10, 0.0)):
        model_step(model, step, 10)
        assert gate.rate.item() == pytest.approx(rate) and gate.active == (rate > 0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    model_step(model, 0, 10)
    assert gate.rate.item() == 0 and not gate.active, "a schedule must not switch a disabled dropout on again"
