"""Factorized layers: every weight is a product of two thin matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hf_reg.base import check_range
from hf_reg.seams.factors import FactorizedLayer, factorize, matrix_of
from hf_reg.seams.reparameterized import Reparameterized, Start
from hf_reg.seams.weights import WeightGate, WeightPatch
from hf_reg.sites.ffn import widths
from hf_reg.sites.weights import WeightSite


__all__ = ["Factorized"]


@dataclass(frozen=True)
class Factorized(WeightPatch):
    """Factorized layers: trains U and V^T in place of every weight W = U V^T of low rank, and computes x V U^T.

    From *Initialization and Regularization of Factorized Neural Layers* (ICLR 2021, arXiv 2105.01029): the linear
    layers of FFN and attention become two thin ones, which begin at the principal singular triplets of the weight
    (spectral initialisation, U = U_r S_r^(1/2), V = V_r S_r^(1/2)), here of the pretrained one. A fused projection is
    factorized as a whole.

    This changes the model, in evaluation too: what is cut away, ||W - U V^T||_F / ||W||_F, is in `describe` for each
    layer. Expect to need training; ranks between a quarter and a half are what the speed is for. Below
    out * in / (out + in) a product costs less than the weight; above it patching warns. MiniLM's whole step takes 0.54
    of its time at rank 0.25, and 0.84 at 0.5 (FFN alone: 0.38 and 0.66).

    Weight decay on U and V is a nuclear norm on the product, and a bug of the authors' script leaves it on beside
    Frobenius decay: take `penalties={"frobenius_decay": {"weight": ..., "kind": "factorized"}}`, for which
    `RegularizedTrainer` takes the factors out of weight decay; in a loop of your own do that by hand.

    U and V are parameters `weight_u` and `weight_v`: make the optimizer after patching (`RegularizedTrainer` does).
    Checkpoints hold stock dense weights U V^T; loading one factorizes it (unless it is the product as it is), which
    keeps the product, not the pair. So a trainer's checkpoints hold the pair beside them, and resuming without it is
    refused. `unpatch_model` gives stock layers with W = U V^T. FSDP and ZeRO-3 are refused, adapters on a patched
    layer too. A forward hook on a layer's child `components` reaches its rank dimension.

    Args:
        rank (`float` or `int`, *optional*, defaults to 0.25): a share of min(out, in), in (0, 1], or a number of
            components; 1.0 cuts nothing away, 1 leaves one component. Our choice; the paper sweeps compression.
        branch (`str`, *optional*, defaults to `"all"`): `"attention"`, `"ffn"` or `"all"`.
        layers, submodel: see [`Patch`].
    """

    name: ClassVar[str] = "factorized"
    formula: ClassVar[str] = "W = U V^T, U = U_r S_r^(1/2), V = V_r S_r^(1/2) of the SVD of W at the start"
    in_eval: ClassVar[bool] = True
    layer_kind: ClassVar[type[Reparameterized]] = FactorizedLayer
    trial: ClassVar[dict[str, float]] = {"rank": 1.0}  # at the full rank the start is the model, but for rounding
    tolerance: ClassVar[float] = 1e-4

    rank: float | int = 0.25

    def __post_init__(self) -> None:
        if isinstance(self.rank, int) and not isinstance(self.rank, bool):
            if self.rank < 1:
                raise ValueError(f"{self.name}: rank={self.rank}; give at least 1, or a share such as 0.25.")
        else:
            check_range(self.name, "rank", self.rank, 0, 1, closed=True)
            if self.rank == 0:
                raise ValueError(f"{self.name}: rank=0.0 leaves nothing; give a share above 0.")
        super().__post_init__()

    def rank_of(self, out: int, into: int) -> int:
        """The number of components of a layer."""
        return self.rank if isinstance(self.rank, int) else max(round(self.rank * min(out, into)), 1)

    def check(self, model: nn.Module, site: WeightSite) -> None:
        super().check(model, site)
        into, out = widths(site.module) or (0, 0)
        if self.rank_of(out, into) > min(out, into):
            raise ValueError(
                f"{self.name}: rank={self.rank}, but {site.path} is {out} x {into}. Give at most {min(out, into)}, a "
                "share such as 0.25, or fewer `layers`."
            )

    def warning(self, sites: Sequence[WeightSite]) -> str:
        sizes = [widths(site.module) or (0, 0) for site in sites]
        dearer = sum(self.rank_of(out, into) * (out + into) > out * into for into, out in sizes)
        if not dearer:
            return ""
        return (
            f"at rank={self.rank} two products cost more than one in {dearer} of {len(sites)} layers; below "
            "out * in / (out + in), half of a square layer, they cost less."
        )

    def initial(self, layer: nn.Module, weight: torch.Tensor) -> Start:
        matrix = matrix_of(layer, weight)
        return factorize(matrix, self.rank_of(*matrix.shape))

    def gate(self, site: WeightSite) -> FactorizedGate:
        return FactorizedGate(self, site)


class FactorizedGate(WeightGate):
    """The gate of one layer; knows what its factors cut away at the start."""

    def __init__(self, patch: Factorized, site: WeightSite) -> None:
        super().__init__(patch, site)
        assert self.start is not None
        matrix = matrix_of(site.module, site.module.weight.detach()).float()  # type: ignore[operator]
        with torch.no_grad():
            rest = matrix - self.start["weight_u"].float() @ self.start["weight_v"].float()
        self.rank = len(self.start["weight_v"])
        self.lost = None if rest.is_meta else (rest.norm() / matrix.norm().clamp(min=1e-30)).item()

    def notes(self) -> str:
        return "" if self.lost is None else f"{self.path} rank {self.rank}, cut {self.lost:.2g}"
