"""Which attention heads DropHead drops."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..attaching import snapshot
from ..patches.drophead import DropHeadGate
from ..patching import unwrap
from ..sites.attention import AttentionSite
from ..sites.finding import find_sites
from .style import ORANGE, drawn, sheet


__all__ = ["head_drops"]


def _label(site: AttentionSite, several: bool) -> str:
    where = f"{site.submodel or site.submodel_class} " if several else ""
    return f"{where}{site.layer}{' cross' if site.cross else ''}"


def _dropped(gate: DropHeadGate, heads: int) -> torch.Tensor:
    """One draw for one example, (H,) bool, as the gate makes it in training."""
    if gate.patch.skip and gate.active:
        kept = torch.zeros(gate.groups, dtype=torch.bool)
        kept[gate.draw_groups()] = True
        return ~kept.repeat_interleave(heads // gate.groups)
    scales = gate.scales(1, heads, gate.rate.device) if gate.active else None
    return torch.zeros(heads, dtype=torch.bool) if scales is None else (scales[0] == 0).cpu()


def _draws(members: list[tuple[AttentionSite, DropHeadGate]], steps: int, seed: int) -> list[torch.Tensor]:
    """A tensor (S, H) of bool for each gate; step after step, layer after layer, as a forward draws."""
    found: list[list[torch.Tensor]] = [[] for _ in members]
    factors = [gate.factor for _, gate in members]
    devices = sorted({gate.rate.device.index for _, gate in members if gate.rate.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for step in range(steps):
                for (site, gate), row in zip(members, found, strict=True):
                    if gate.schedule is not None:
                        gate.factor = gate.schedule(step, steps)
                    assert site.heads is not None
                    row.append(_dropped(gate, site.heads))
    finally:
        for (_, gate), factor in zip(members, factors, strict=True):
            gate.factor = factor
    return [torch.stack(row) for row in found]


@drawn
def head_drops(model: nn.Module, *, steps: int = 200, step: int | None = None, seed: int = 0) -> Any:
    """Draw how often the gates of DropHead drop each head of each layer, and one draw.

    The gates on the model draw, as in training steps for one example each; a schedule runs through its course in
    these steps. The model is left as it is, and so is torch's random stream.

    Args:
        model (`nn.Module`): patched with `"drophead"`, in any wrapper.
        steps (`int`, *optional*, defaults to 200): draws to count.
        step (`int`, *optional*): the draw that is shown by itself, from 0; by default the last.
        seed (`int`, *optional*, defaults to 0): of the draws.

    Returns:
        `matplotlib.figure.Figure`: on the left the share of the steps in which a head was dropped, on the right one
        draw; a row for each attention module, from the first layer down.

    Raises:
        `ValueError`: for a model without DropHead, or a step that is not among the steps.
        `ImportError`: without matplotlib.
    """
    inner = unwrap(model)
    members = snapshot(inner, find_sites(inner, "attention")).get("drophead", [])
    if not members:
        raise ValueError('head_drops: the model carries no "drophead"; call patch_model(model, "drophead") first.')
    if steps < 1 or not -steps <= (-1 if step is None else step) < steps:
        raise ValueError(f"head_drops: step={step} of steps={steps}; expected at least one step, and one of them.")
    shown = range(steps)[-1 if step is None else step]
    draws = _draws(members, steps, seed)  # type: ignore[arg-type]

    heads = max(draw.shape[1] for draw in draws)
    table, one = torch.full((2, len(draws), heads), torch.nan)
    for row, draw in enumerate(draws):
        table[row, : draw.shape[1]] = draw.float().mean(0)
        one[row, : draw.shape[1]] = draw[shown].float()
    return _picture(members, table, one, shown, steps)


def _picture(members: list[Any], table: torch.Tensor, one: torch.Tensor, shown: int, steps: int) -> Any:
    from matplotlib.colors import ListedColormap

    rows, heads = table.shape
    figure = sheet(max(7.0, 2.6 + 0.52 * heads), max(3.2, 1.9 + 0.27 * rows))
    left, right = figure.subplots(1, 2, sharey=True)
    several = len({site.submodel for site, _ in members}) > 1
    peak = float(table.nan_to_num().max()) or 1.0
    image = left.imshow(table.numpy(), cmap="Blues", vmin=0, vmax=peak, aspect="auto")
    right.imshow(one.numpy(), cmap=ListedColormap(["#ededed", ORANGE]), vmin=0, vmax=1, aspect="auto")
    for axes in (left, right):
        axes.set_xticks(range(0, heads, 1 if heads <= 16 else 4))
        axes.grid(False)
        axes.set_xticks([i - 0.5 for i in range(heads + 1)], minor=True)
        axes.set_yticks([i - 0.5 for i in range(rows + 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="both", length=0)
        axes.set_xlabel("head")
    left.set_yticks(range(rows), [_label(site, several) for site, _ in members])
    left.set_ylabel("layer")
    if rows * heads <= 160:
        for row in range(rows):
            for head in range(heads):
                share = float(table[row, head])
                if share == share:  # modules may have fewer heads than the widest
                    colour = "white" if share > 0.6 * peak else "#1a1a1a"
                    left.text(head, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7.5)
    gate = members[0][1]
    scheduled = "" if gate.schedule is None else f", schedule {type(gate.schedule).__name__}"
    left.set_title(f"dropped in % of {steps} steps\n(p = {gate.p:g}{scheduled})")
    dropped, present = int(one.nan_to_num().sum()), int((one == one).sum())
    right.set_title(f"step {shown}: {dropped} of {present} heads\ndropped (orange)")
    figure.colorbar(image, ax=left, format=lambda value, _: f"{100 * value:.0f} %", location="bottom", shrink=0.8)
    figure.suptitle("DropHead")
    return figure
