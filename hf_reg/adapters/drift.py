"""`spectrum_drift`: how far fine-tuning moved the singular values and the singular vectors of every layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torch import nn

from hf_reg.tables import Shown

from .linear import SvdLinear
from .svd import readable, widened
from .triplets import full_precision


__all__ = ["LayerDrift", "SpectrumDrift", "spectrum_drift"]

LONG = 48  # more layers than this are shown by kind
WRAPPERS = re.compile(
    r"^(?:module\.|_orig_mod\.|base_model\.model\.)+|\.(?:base_layer|_orig_mod|modules_to_save\.[^.]+)(?=\.|$)"
)
RESIDUAL_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations of PEFT that change the base weight
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")  # Okabe and Ito's
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")


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
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('plot() needs matplotlib: run `pip install "hf_reg[report]"`.') from error
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for number, (kind, rows) in enumerate(self.kinds.items()):
            axes.scatter(
                [row.values for row in rows], [row.vectors for row in rows], label=kind, s=44, alpha=0.85,
                color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)], linewidths=0,
            )  # fmt: skip
        axes.set(
            title="Drift of singular values and singular vectors", xlim=(0, None), ylim=(0, None),
            xlabel=r"$\Delta\Sigma$, mean change of a singular value",
            ylabel=r"$\Delta D$, mean change of direction",
        )  # fmt: skip
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def _cells(rows: Sequence[LayerDrift]) -> tuple[str, ...]:
    average = {name: mean(getattr(row, name) for row in rows) for name in NUMBERS}
    return (
        f"{average['values']:.3g}",
        f"{average['vectors']:.4f}",
        f"{average['overlap']:.4f}",
        f"{average['condition_before']:.3g} -> {average['condition_after']:.3g}",
        f"{average['effective_rank_before']:.1f} -> {average['effective_rank_after']:.1f}",
    )


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a model with and without adapters, each adapter layer once, by its plain name."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) or ".original_module" in name:  # PEFT's modules_to_save keep their first self
            continue
        if hasattr(module, "base_layer"):
            inside += (f"{name}.",)
            layer = module.get_base_layer()
        else:
            layer = module
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
            yield WRAPPERS.sub("", name), module


def _adapted(layer: Any) -> torch.Tensor:
    """A weight as it is; of an adapter layer with its active adapters added, in fp32. The layer stays as it is."""
    if isinstance(layer, torch.Tensor):
        return layer
    if getattr(layer, "merged", False):
        raise ValueError("Its adapter is merged into the base weight. Call model.unmerge_adapter() first.")
    if isinstance(layer, SvdLinear):
        adapters = [name for name in layer.active_adapters if name in layer.lora_A]
        return sum((layer.change(name) for name in adapters), readable(layer.pretrained_weight()).float())
    variants = getattr(layer, "lora_variant", {})
    if not hasattr(layer, "get_delta_weight") or any(adapter in variants for adapter in layer.active_adapters):
        raise ValueError(
            f"A {type(layer).__name__} whose change is no plain sum (DoRA, say). Pass the pretrained model as `base` "
            "and a copy of this one after merge_and_unload() as `tuned`."
        )
    weight = readable(layer.get_base_layer().weight).float()
    adapters = [name for name in layer.active_adapters if name in getattr(layer, layer.adapter_layer_names[0])]
    return sum((layer.get_delta_weight(name).to(weight) for name in adapters), weight)


def _named(model: nn.Module | Mapping[str, torch.Tensor], pick: str) -> dict[str, Any]:
    """Layer names to weights, or to the adapter layers that make them; `pick` names the argument in errors."""
    if isinstance(model, nn.Module):
        return {name: layer if hasattr(layer, "base_layer") else layer.weight for name, layer in _linear(model)}
    if not isinstance(model, Mapping):
        raise TypeError(f"{pick}: expected a model (torch.nn.Module) or a state dict, got {type(model).__name__}.")
    if adapter := next((key for key in model if ".lora_" in key), None):
        raise ValueError(f"{pick}: {adapter!r} belongs to an adapter. Pass the PeftModel itself, or a merged model.")
    return {
        WRAPPERS.sub("", key.removesuffix(".weight")): tensor
        for key, tensor in model.items()
        if key.endswith(".weight") and tensor.dim() == 2
    }


def _select(names: Sequence[str], target_modules: str | Sequence[str] | None) -> list[str]:
    """As PEFT does: a string is a regular expression of the whole name, in a list are ends of names."""
    if target_modules is None:
        chosen = list(names)
    elif isinstance(target_modules, str):
        chosen = [name for name in names if re.fullmatch(target_modules, name)]
    else:
        chosen = [name for name in names if any(f".{name}".endswith(f".{end}") for end in target_modules)]
    if not chosen:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
        raise ValueError(f"target_modules={target_modules!r} selects no linear layer; the kinds here: {kinds}.")
    return chosen


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
    after = _named(tuned, "tuned")
    if base is None:
        after = {name: layer for name, layer in after.items() if isinstance(layer, nn.Module)}
        _check_own_base(tuned, after)
        before = {
            name: layer.pretrained_weight() if isinstance(layer, SvdLinear) else layer.get_base_layer().weight
            for name, layer in after.items()
        }
    else:
        before = _named(base, "base")
    names = _select(list(dict.fromkeys([*after, *before])), target_modules)
    if alone := [name for name in names if name not in before or name not in after]:
        where = "base" if alone[0] in before else "tuned"
        raise ValueError(
            f"{len(alone)} layers are only in one of the models ({alone[0]} in {where}). Compare a model with its own "
            "base, or choose the layers by target_modules."
        )
    rows = []
    for name in names:
        try:
            rows.append(_compare(name, _adapted(before[name]), _adapted(after[name]), rank))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return SpectrumDrift(rows, rank)


def _check_own_base(tuned: Any, adapted: Mapping[str, Any]) -> None:
    """Refuse what has no adapter, and adapters whose base weight is no longer the pretrained one."""
    if not adapted:
        raise ValueError("base=None needs a model with adapters (a PeftModel). Pass the pretrained model as `base`.")
    for config in getattr(tuned, "peft_config", {}).values():
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.startswith(RESIDUAL_BASES):
            raise ValueError(
                f"init_lora_weights={start!r} took its start out of the base weights: they are not the pretrained "
                "ones. Pass the pretrained model as `base`."
            )
