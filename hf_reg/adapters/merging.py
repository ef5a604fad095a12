"""Merging an adapter into its model: added in fp32, rounded once, and compared with the unmerged model on a probe."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.table import Table
from torch import nn

from hf_reg.tables import Shown
from hf_reg.training.loss_scale import evaluating


__all__ = ["MergeReport", "merge_adapter"]

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class MergeReport(Shown):
    """How far a merged model is from the unmerged one.

    Attributes:
        dtype (`torch.dtype`): of the merged weights.
        layers (`int`): how many weights the adapter was merged into.
        largest (`float`): largest absolute change of a logit of the probe.
        relative (`float`): that over the largest absolute logit.
        agreement (`float`): share of the probe's positions whose largest logit is the same one.
        tolerance (`float`): the largest `relative` that is accepted.
        lost (`float`): largest share ||rounding|| / ||adapter|| of a layer's change that the weight's dtype lost.
        worst (`str`): that layer.
    """

    dtype: torch.dtype
    layers: int
    largest: float
    relative: float
    agreement: float
    tolerance: float
    lost: float
    worst: str

    def _table(self) -> Table:
        table = Table(title="merged against unmerged, on the probe batch", title_justify="left")
        table.add_column("measure")
        table.add_column("value", justify="right")
        table.add_row("weights merged", f"{self.layers} ({self.dtype})")
        table.add_row("largest change of a logit", f"{self.largest:.3g}")
        table.add_row("relative to the largest logit", f"{self.relative:.3g} (accepted: {self.tolerance:g})")
        table.add_row("same prediction", f"{self.agreement:.2%}")
        table.add_row("adapter lost in rounding, worst layer", f"{self.lost:.2%} ({self.worst})")
        return table


def _probe(model: nn.Module) -> dict[str, torch.Tensor]:
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} takes more than input_ids, so no probe can be made up for it. Pass probe=, a "
            "batch of its inputs."
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 32), generator=generator)
    return {"input_ids": ids.to(next(model.parameters()).device)}


def _logits(model: nn.Module, probe: Mapping[str, Any]) -> torch.Tensor:
    with evaluating(model):
        outputs = model(**probe)
    found = getattr(outputs, "logits", None)
    if found is None and hasattr(outputs, "start_logits"):  # of answers to questions
        found = torch.stack((outputs.start_logits, outputs.end_logits))
    found = outputs.last_hidden_state if found is None else found
    return found.float()


def _lost(layer: Any, before: torch.Tensor) -> float:
    """Share of what the active adapters add to a weight that its dtype rounded away."""
    deltas = [layer.get_delta_weight(name).float() for name in layer.merged_adapters if name in layer.lora_A]
    exact = torch.stack(deltas).sum(0)
    size = torch.linalg.vector_norm(exact)
    rounding = torch.linalg.vector_norm(layer.get_base_layer().weight.float() - (before.float() + exact))
    return float(rounding / size) if size > 0 else 0.0


@torch.no_grad()
def merge_adapter(
    model: PeftModel, probe: Mapping[str, Any] | None = None, *, tolerance: float | None = None
) -> tuple[nn.Module, MergeReport]:
    """Merge the active adapters of a model into its weights, and see that the model is still the same.

    Args:
        model (`PeftModel`): is taken apart: what comes back is its base model.
        probe (mapping of `str` to `torch.Tensor`, *optional*):
            Inputs on which merged and unmerged model are compared; by default 2 x 32 random tokens.
        tolerance (`float`, *optional*):
            Largest accepted change relative to the largest logit; by default 1e-4 in fp32, 1e-2 in fp16 and 5e-2 in
            bf16 (we chose them).

    Returns:
        `(nn.Module, MergeReport)`: the merged model, and what changed. The report prints as a table.

    Raises:
        `TypeError`: for what is no `PeftModel`. `ValueError`: for an adapter that is merged already, a quantised base,
            a probe that is missing, or a change beyond the tolerance: then nothing is merged.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model is {type(model).__name__}: expected a PeftModel with an active adapter.")
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight")
    }
    if any(layer.merged for layer in layers.values()):
        raise ValueError("The adapter is merged already. Call model.unmerge_adapter() first.")
    probe = _probe(model) if probe is None else probe
    before = _logits(model, probe)
    if hasattr(model, "_unfold"):
        model._unfold()
    kept = {name: layer.get_base_layer().weight.data.clone() for name, layer in layers.items()}
    try:
        model.merge_adapter()
        after = _logits(model, probe)
        losses = {name: _lost(layer, kept[name]) for name, layer in layers.items() if layer.merged}
        worst = max(losses, key=losses.__getitem__)
        dtype = next(iter(kept.values())).dtype
        largest = float((after - before).abs().max())
        report = MergeReport(
            dtype=dtype, layers=len(losses), largest=largest, relative=largest / float(before.abs().max()),
            agreement=float((after.argmax(-1) == before.argmax(-1)).float().mean()),
            tolerance=TOLERANCES[dtype] if tolerance is None else tolerance, lost=losses[worst], worst=worst,
        )  # fmt: skip
        if not report.relative <= report.tolerance:
            raise ValueError(
                f"Merging changed a logit by {report.largest:.3g}, {report.relative:.3g} of the largest, where "
                f"{report.tolerance:g} is accepted ({report.dtype} lost {report.lost:.0%} of the adapter in "
                f"{report.worst}). Merge in fp32 (model.float()), or serve the adapter unmerged."
            )
    except BaseException:
        for name, layer in layers.items():
            layer.get_base_layer().weight.data = kept[name]
            layer.merged_adapters.clear()
        raise
    with warnings.catch_warnings():  # PEFT remarks that the layers are merged already
        warnings.simplefilter("ignore")
        return model.base_model.merge_and_unload(), report
