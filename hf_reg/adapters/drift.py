"""`spectrum_drift`: how far fine-tuning moved the singular values and the singular vectors of every layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torch import nn

from hf_reg.tables import Shown

from .pairs import weight_pairs
from .svd import readable, widened
from .triplets import full_precision


__all__ = ["LayerDrift", "SpectrumDrift", "spectrum_drift"]

LONG = 48  # more layers than this are shown by kind


@dataclass(frozen=True)
class LayerDrift:
    """One layer; triplet i is (u_i, s_i, v_i) before and (u_i', s_i', v_i') after, k = min(out, in) of them.

    Attributes:
        name, kind (`str`): the module's name, and what follows its layer number, such as `"self_attn.q_proj"`.
        shape (`tuple`): of the weight.
        values (`float`): SORSA's Delta Sigma = 1/k sum_i |s_i' - s_i|.
        vectors (`float`): SORSA's Delta D = 1 - 1/2k sum_i (|<u_i, u_i'>| + |<v_i, v_i'>|), from 0 to 1.
        overlap (`float`): of the leading subspaces, 1/2r (||U_r^T U_r'||_F^2 + ||V_r^T V_r'||_F^2), 1 if they agree.
        condition_before, condition_after (`float`): s_1 / s_r.
        effective_rank_before, effective_rank_after (`float`): exp of the entropy of s / sum s (Roy and Vetterli 2007).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    values: float
    vectors: float
    overlap: float
    condition_before: float
    condition_after: float
    effective_rank_before: float
    effective_rank_after: float


NUMBERS = tuple(field.name for field in fields(LayerDrift))[3:]


@dataclass(frozen=True)
class SpectrumDrift(Shown):
    """What [`spectrum_drift`] found: `print` it for a table, a notebook shows it as HTML; `plot()` draws it.

    Attributes:
        rows (`list` of [`LayerDrift`]): a row per layer, in the model's order.
        rank (`int`): of the leading part whose overlap and condition number are given.
    """

    rows: list[LayerDrift]
    rank: int

    @property
    def kinds(self) -> dict[str, list[LayerDrift]]:
        """The rows of each kind of layer."""
        kinds: dict[str, list[LayerDrift]] = {}
        for row in self.rows:
            kinds.setdefault(row.kind, []).append(row)
        return kinds

    def _table(self) -> Table:
        many = len(self.rows) > LONG
        caption = f"Means by kind; .rows has all {len(self.rows)} layers." if many else None
        table = Table(
            title=f"Drift of the spectrum, rank {self.rank}", title_justify="left",
            caption=caption, caption_justify="left",
        )  # fmt: skip
        table.add_column("layer", overflow="fold")
        for name in ("values", "vectors", "overlap", f"s_1 / s_{self.rank}", "effective rank"):
            table.add_column(name, justify="right")
        groups = self.kinds if many else {row.name: [row] for row in self.rows}
        for label, rows in groups.items():
            table.add_row(f"{len(rows)} x {label}" if many else label, *_cells(rows))
        table.add_section()
        table.add_row("mean", *_cells(self.rows))
        return table

    def plot(self) -> Any:
        """Singular-vector over singular-value drift, a point per layer, in the colour and shape of its kind.

        Returns:
            `matplotlib.figure.Figure`: `savefig` it, or leave it to the notebook.

        Raises:
            `ImportError`: without matplotlib.
        """
        from ..report.spectra import drift_plot

        return drift_plot(self.kinds)


def _cells(rows: Sequence[LayerDrift]) -> tuple[str, ...]:
    average = {name: mean(getattr(row, name) for row in rows) for name in NUMBERS}
    return (
        f"{average['values']:.3g}",
        f"{average['vectors']:.4f}",
        f"{average['overlap']:.4f}",
        f"{average['condition_before']:.3g} -> {average['condition_after']:.3g}",
        f"{average['effective_rank_before']:.1f} -> {average['effective_rank_after']:.1f}",
    )


def _compare(name: str, before: torch.Tensor, after: torch.Tensor, rank: int) -> LayerDrift:
    before, after = readable(before), readable(after)
    if before.shape != after.shape:
        raise ValueError(
            f"{tuple(before.shape)} in base, {tuple(after.shape)} in tuned. Compare a model with its own base, or "
            "leave the layer out by target_modules."
        )
    with full_precision(before):
        (u, s, v), (u2, s2, v2) = (
            torch.linalg.svd(widened(weight, 1), full_matrices=False) for weight in (before, after)
        )
        cosines = ((u * u2).sum(0).abs() + (v * v2).sum(1).abs()) / 2
        top = min(rank, len(s))
        shared = (u[:, :top].mT @ u2[:, :top]).square().sum() + (v[:top] @ v2[:top].mT).square().sum()
        shares = [values / values.sum() for values in (s, s2)]
        numbers = (
            (s2 - s).abs().mean(), 1 - cosines.mean().clamp(max=1), (shared / (2 * top)).clamp(max=1),
            s[0] / s[top - 1], s2[0] / s2[top - 1], *(torch.special.entr(share).sum().exp() for share in shares),
        )  # fmt: skip
        return LayerDrift(
            name, re.sub(r".*\.\d+\.", "", name), tuple(before.shape), *(float(value) for value in numbers)
        )


def spectrum_drift(
    base: nn.Module | Mapping[str, torch.Tensor] | None,
    tuned: nn.Module | Mapping[str, torch.Tensor],
    *,
    rank: int = 16,
    target_modules: str | Sequence[str] | None = None,
) -> SpectrumDrift:
    """How far fine-tuning moved the spectrum of each layer: the analysis of SORSA (arXiv 2409.00055), with full SVDs.

    The formulas are at [`LayerDrift`]; Delta Sigma and Delta D are those of the paper's analysis. Triplets are
    compared by their place: where singular values are nearly equal, their vectors turn at the least change, and Delta
    D says so; the overlap at `rank` does not depend on the order within the leading part.

    Args:
        base (`nn.Module`, state dict or `None`): the pretrained model; `None` takes the base weights of `tuned`, a
            `PeftModel`, which then has its adapters in the layers that are compared.
        tuned (`nn.Module` or state dict): the fine-tuned model; adapters count as if they were merged, and stay as
            they are. Of a state dict every matrix `*.weight` is a layer, embeddings included.
        rank (`int`, *optional*, defaults to 16): of the leading part; the short side where that is smaller.
        target_modules (`str` or list of `str`, *optional*): the layers to compare, as in PEFT: a regular expression of
            the whole name, or a list of ends of names. Defaults to every linear layer of both.

    Returns:
        [`SpectrumDrift`].

    Raises:
        `ValueError`: for layers that only one of the two has or of different shapes, weights without values (meta,
            sharded) or quantised, merged adapters and those that are no sum, and if nothing is selected.
        `TypeError`: for what is neither a model nor a state dict.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: expected at least 1.")
    rows = []
    for name, pair in weight_pairs(base, tuned, target_modules).items():
        try:
            rows.append(_compare(name, *pair(), rank))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return SpectrumDrift(rows, rank)
