"""Elastic weight consolidation (arXiv 1612.00796): stay near the old weights where they mattered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from .anchored import AnchoredPenalty, _part
from .answers import answer_mask
from .precision import widen
from .rows import rows


__all__ = ["EWC", "fisher_information"]


def _examples(batch: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The examples of a batch, each as a batch of one."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
    sizes = {key: value.shape[0] for key, value in tensors.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"fisher_information: cannot split a batch of first dimensions {sizes}; use a batch size of 1."
        )
    for i in range(next(iter(sizes.values()))):
        yield {**batch, **{key: value[i : i + 1] for key, value in tensors.items()}}


def _surprise(model: nn.Module, inputs: Mapping[str, Any], empirical: bool) -> torch.Tensor:
    """The loss of one example, on its labels or on labels drawn from the model."""
    outputs = model(**inputs)
    if empirical:
        if getattr(outputs, "loss", None) is None:
            raise ValueError(
                "fisher_information: the model gave no loss; the batches need labels (or empirical=False)."
            )
        return outputs.loss
    if outputs.logits.shape[-1] < 2:
        raise ValueError("fisher_information: empirical=False draws classes, but the logits have one column.")
    logits = rows(outputs.logits, answer_mask(model, inputs, outputs.logits))
    drawn = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
    return functional.cross_entropy(logits, drawn)


def fisher_information(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    samples: int | None = None,
    empirical: bool = True,
) -> dict[str, torch.Tensor]:
    """Diagonal of the Fisher information: the mean over examples of the squared gradient of each example's loss.

    The gradients are taken one example at a time, which is slow but right: the square of a batch's mean gradient is
    something else. The loss is the model's own, for tokens a mean over those of the example. The model runs in
    evaluation mode, and its modes and `.grad`s are afterwards as they were, whatever happens.

    Args:
        model (`nn.Module`): unwrapped and not sharded; parameters without gradient are left out.
        dataloader (iterable of mappings): batches, with labels.
        samples (`int`, *optional*): stop after so many examples. Default: all of them.
        empirical (`bool`, *optional*, defaults to `True`):
            On the labels of the data; `False`: on labels drawn from the model (the Fisher information itself).

    Returns:
        `dict` of `str` to `torch.Tensor`: by parameter name, at least fp32, for [`EWC`].

    Raises:
        `ValueError`: for `samples < 1`, no example, no loss, a batch that cannot be split or sharded parameters.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"fisher_information: samples={samples} is out of range; give samples >= 1, or None for all.")
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not weights or any(hasattr(w, "full_tensor") or w.numel() == 0 or w.is_meta for w in weights.values()):
        raise ValueError(
            "fisher_information: it needs trainable parameters that are whole; compute it before sharding."
        )
    device = next(iter(weights.values())).device
    fisher = {name: torch.zeros_like(widen(weight.detach())) for name, weight in weights.items()}
    modes = {module: module.training for module in model.modules()}
    count = 0
    try:
        model.eval()
        with torch.enable_grad(), tqdm(total=samples, desc="Fisher", unit="example", disable=None) as bar:
            for example in (example for batch in dataloader for example in _examples(batch)):
                inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in example.items()}
                loss = _surprise(model, inputs, empirical)
                grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for total, grad in zip(fisher.values(), grads, strict=True):
                    if grad is not None:
                        total += widen(grad).square()
                count += 1
                bar.update()
                if count == samples:
                    break
    finally:
        for module, training in modes.items():
            module.training = training
    if count == 0:
        raise ValueError("fisher_information: the dataloader gave no example.")
    return {name: total / count for name, total in fisher.items()}


@dataclass(eq=False)
class EWC(AnchoredPenalty):
    """Elastic weight consolidation: sum_j F_j (w_j - w0_j)^2 / 2, times `weight` (lambda).

    From *Overcoming Catastrophic Forgetting in Neural Networks* (arXiv 1612.00796, equation 3). w0 are the weights at
    `prepare`. Parameters that `fisher` does not name, such as a new head, are free.

    Args:
        fisher (mapping of `str` to `torch.Tensor`):
            By parameter name, see [`fisher_information`]. May be left out where `load_state_dict` brings it.
        weight, schedule, scope, name: see [`~hf_reg.base.Penalty`]. The paper's lambda depends on the task.
    """

    NAME: ClassVar[str] = "ewc"
    FORMULA: ClassVar[str] = "1/2 sum_j F_j (w_j - w0_j)^2"

    fisher: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fisher = {name: tensor.detach() for name, tensor in self.fisher.items()}

    def anchored(self, name: str) -> bool:
        return name in self.fisher

    def prepare(self, model: nn.Module) -> None:
        known = {name for name, _ in model.named_parameters()}
        strange = sorted(set(self.fisher) - known)
        if strange or not self.fisher:
            what = f"names {strange[0]!r}, which {type(model).__name__} does not have" if strange else "is empty"
            raise ValueError(f"{self.name}: fisher {what}; pass fisher_information(model, dataloader) of this model.")
        super().prepare(model)
        if not self.anchors:
            raise ValueError(f"{self.name}: fisher names no parameter in scope {self.scope!r}; widen `scope`.")
        for name, anchor in self.anchors.items():
            if self.fisher[name].shape != anchor.shape:
                raise ValueError(
                    f"{self.name}: fisher of {name} is {tuple(self.fisher[name].shape)}, expected "
                    f"{tuple(anchor.shape)}; it belongs to another model."
                )

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        terms = []
        for name, weight, distance in self.distances(model):
            if distance is not None:
                fisher = self.fisher[name]
                if fisher.device != weight.device:
                    fisher = fisher.to(weight.device)
                    self.fisher = {**self.fisher, name: fisher}
                terms.append((widen(fisher) * distance.square()).sum() / 2)
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | {f"fisher.{name}": tensor for name, tensor in self.fisher.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        self.fisher = _part(state, "fisher.")
