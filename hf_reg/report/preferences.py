"""What a preference run does to the two answers of a pair."""

from __future__ import annotations

from typing import Any

from .history import Log, find_series, logs_of, need_series
from .style import BLACK, BLUE, VERMILLION, drawn, sheet


__all__ = ["preference_curves"]

PANELS: tuple[tuple[str, dict[str, tuple[str, str, str]]], ...] = (  # title; key: label, colour, marker
    ("log-probability of an answer", {
        "logps/chosen": ("chosen", BLUE, "o"), "logps/rejected": ("rejected", VERMILLION, "s"),
    }),
    ("reward: beta (policy - reference)", {
        "rewards/chosen": ("chosen", BLUE, "o"), "rewards/rejected": ("rejected", VERMILLION, "s"),
        "rewards/margins": ("margin", BLACK, "^"),
    }),
    ("parts of the loss", {
        "loss_dpo": ("preference (DPO)", BLACK, "^"), "loss_sft": ("likelihood (SFT)", BLUE, "o"),
    }),
    ("pairs ranked right by reward", {"rewards/accuracies": ("accuracy", BLACK, "^")}),
)  # fmt: skip
NEEDED = ("logps/chosen", "logps/rejected")


@drawn
def preference_curves(history: Any) -> Any:
    """Draw what a DPO or RPO run logs: log-probs of chosen and rejected answers, rewards, the parts of the loss.

    Both log-probs falling is the over-optimisation that RPO's likelihood term works against (arXiv 2405.16436).

    Args:
        history (`Trainer`, its `state` or `log_history`): of an [`RPOTrainer`], or of TRL's `DPOTrainer`, whose logs
            have the same names.

    Returns:
        `matplotlib.figure.Figure`: training solid, held out dashed; the plots of what was not logged are left out.

    Raises:
        `ValueError`: where the log-probs were not logged; names what was. `TypeError`: for something without logs.
        `ImportError`: without matplotlib.
    """
    logs = logs_of(history)
    for key in NEEDED:
        try:
            need_series(logs, key, f"eval_{key}")
        except ValueError as error:
            raise ValueError(f"preference_curves: {error}") from error
    panels = [panel for panel in PANELS if any(_found(logs, key) for key in panel[1])]
    lines = -(-len(panels) // 2)
    figure = sheet(7.6, 0.3 + 3.4 * lines)
    grid = figure.subplots(lines, 2, squeeze=False)
    for axes, (title, keys) in zip(grid.flat, panels, strict=False):
        for key, (label, colour, marker) in keys.items():
            for prefix, style, said in (("", "-", ""), ("eval_", (0, (4, 2)), ", held out")):
                steps, values = find_series(logs, prefix + key)
                if steps:
                    axes.plot(
                        steps, values, label=label + said, color=colour, linestyle=style, marker=marker, markersize=4,
                        markevery=max(len(steps) // 8, 1), markerfacecolor="white" if prefix else colour,
                    )  # fmt: skip
        axes.set(title=title, xlabel="step")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8)
        if "rewards/accuracies" in keys:
            axes.set_ylim(-0.03, 1.03)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    return figure


def _found(logs: list[Log], key: str) -> bool:
    return any(find_series(logs, key, f"eval_{key}")[0])
