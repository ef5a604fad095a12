"""How schedules move a rate over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..schedules import Schedule, make_schedule
from .style import drawn, legend_below, looks, plain, sheet


__all__ = ["schedule_curves"]


def _label(schedule: Schedule) -> str:
    """The name, and the settings that are not the defaults."""
    own = [(field.name, getattr(schedule, field.name), field.default) for field in fields(schedule)]  # type: ignore[arg-type]
    changed = ", ".join(f"{name}={value:g}" for name, value, default in own if value != default)
    return f"{type(schedule).__name__}({changed})" if changed else type(schedule).__name__


def _named(schedules: Any) -> dict[str, Schedule]:
    if isinstance(schedules, (str, Schedule)):
        schedules = [schedules]
    if isinstance(schedules, Mapping):
        return {str(label): make_schedule(one) for label, one in schedules.items()}
    made = [make_schedule(one) for one in schedules]
    return {_label(one): one for one in made}


@drawn
def schedule_curves(
    schedules: Mapping[str, Schedule | str] | Sequence[Schedule | str] | Schedule | str,
    steps: int = 1000,
    *,
    rate: float | None = None,
    evaluations: Sequence[tuple[int, float]] = (),
) -> Any:
    """Draw the factor of schedules, or the rate in force, at every step of a run.

    Args:
        schedules ([`~hf_reg.schedules.Schedule`], `str`, a sequence of them, or a `dict` with labels as keys):
            By name or as objects.
        steps (`int`, *optional*, defaults to 1000): of the run.
        rate (`float`, *optional*): draws `rate * factor`, what a patch of this rate does; by default the factor.
        evaluations (sequence of `(step, loss)`, *optional*): validation losses, which `on_plateau` goes by.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        `ValueError`: for an unknown name, no schedule or no step. `TypeError`: for something that is no schedule.
        `ImportError`: without matplotlib.

    Example:

    ```python
    schedule_curves(["v_shape", "linear", two_phase(begin=0.5)], steps=500, rate=0.2)
    ```
    """
    named = _named(schedules)
    if not named or steps < 1:
        raise ValueError(f"schedule_curves: {len(named)} schedules over {steps} steps; expected at least one of each.")
    figure = sheet(7, 4)
    axes = figure.subplots()
    for (label, schedule), look in zip(named.items(), looks(list(named)).values(), strict=True):
        factors = [
            schedule(step, steps, [loss for at, loss in evaluations if at <= step]) for step in range(steps + 1)
        ]
        values = [factor if rate is None else factor * rate for factor in factors]
        every = (steps // 20, max(steps // 8, 1))
        axes.plot(range(steps + 1), values, label=plain(label, 48), markevery=every, **look)
    for at, _ in evaluations:
        axes.axvline(at, color="#bdbdbd", linewidth=0.8, linestyle=":", zorder=0)
    axes.set(
        xlabel="step" + (" (dotted: evaluations)" if evaluations else ""), xlim=(0, steps), ylim=(0, None),
        ylabel="factor on the rate" if rate is None else f"rate in force (rate {rate:g} times factor)",
        title="Schedules",
    )  # fmt: skip
    axes.margins(y=0.08)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure
