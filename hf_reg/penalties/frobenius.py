"""Frobenius decay (arXiv 2105.01029): weight decay on the product of two factors instead of on each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_reg.base import Penalty, check_choice
from hf_reg.distributed import named_whole_parameters, select_parameters

from .precision import exactly, widen
from .products import Product, factorized_products, head_products, lora_products


__all__ = ["FrobeniusDecay", "frobenius_product"]


def frobenius_product(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """1/2 ||U V^T||_F^2 = 1/2 tr((V^T V)(U^T U)) (arXiv 2105.01029), without forming U V^T.

    Args:
        u (`torch.Tensor` of shape `(m, r)`): with leading dimensions, the terms are summed over them.
        v (`torch.Tensor` of shape `(n, r)`): leading dimensions broadcast against those of `u`.

    Returns:
        `torch.Tensor` of shape `()`; its gradients are U V^T V and V U^T U.

    Raises:
        `ValueError`: for shapes that do not fit.
    """
    if u.dim() < 2 or v.dim() < 2 or u.shape[-1] != v.shape[-1]:
        raise ValueError(f"u {tuple(u.shape)}, v {tuple(v.shape)}: expected (m, r) and (n, r).")
    with exactly(u):
        u, v = widen(u), widen(v)
        return ((u.mT @ u) * (v.mT @ v)).sum() / 2


@dataclass(eq=False)
class FrobeniusDecay(Penalty):
    """Frobenius decay: 1/2 ||product||_F^2 of factor pairs, see [`frobenius_product`], times `weight` (lambda).

    From *Initialization and Regularization of Factorized Neural Layers* (arXiv 2105.01029). Switch weight decay off
    for the factors: the authors' training script leaves both on, a bug; for kind `"factorized"` `RegularizedTrainer`
    does it. Biases and the 1 / sqrt(d) of attention do not enter. A pair counts if both factors are in scope and take
    a gradient.

    Args:
        kind (`str` or sequence of `str`, *optional*, defaults to `"lora"`):
            `"lora"`: scaling * B A of the active adapters; `"factorized"`: U V^T of the layers under the patch of that
            name; `"qk"`: Q_h^T K_h of every head; `"ov"`: O_h V_h of every head. Under grouped-query attention the sum
            runs over the query heads, which share keys and values.
        weight, schedule, scope, name: see [`~hf_reg.base.Penalty`].
    """

    NAME: ClassVar[str] = "frobenius_decay"
    FORMULA: ClassVar[str] = "sum over pairs of 1/2 ||U V^T||_F^2"
    ON_PARAMETERS: ClassVar[bool] = True
    KINDS: ClassVar[tuple[str, ...]] = ("lora", "qk", "ov", "factorized")
    WHOLE: ClassVar[Mapping[str, Callable[[nn.Module], Iterator[Product]]]] = {
        "lora": lora_products, "factorized": factorized_products
    }  # fmt: skip

    kind: str | Sequence[str] = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kinds = (self.kind,) if isinstance(self.kind, str) else tuple(self.kind)
        if not self.kinds:
            raise ValueError(f"{self.name}: kind is empty; give one or more of {', '.join(self.KINDS)}.")
        for kind in self.kinds:
            check_choice(self.name, "kind", kind, self.KINDS)

    def undecayed(self, model: nn.Module) -> Collection[str]:
        if "factorized" not in self.kinds:
            return ()
        inside = {name for name, _ in select_parameters(model, self.scope)}
        pairs = [product.names() for product in factorized_products(model)]
        return {name for pair in pairs if pair <= inside for name in pair}

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        products: dict[str, list[Product]] = {kind: [] for kind in self.kinds}
        unknown: dict[str, str] = {}  # path: class
        for kind in self.kinds:
            if kind in self.WHOLE:
                products[kind] = list(self.WHOLE[kind](model))
                continue
            for site, product in head_products(model, kind):
                if product is None:
                    unknown[site.path] = type(site.module).__name__
                else:
                    products[kind].append(product)
        wanted = {name for found in products.values() for product in found for name in product.names()}
        weights: dict[str, torch.Tensor] = {}
        for name, weight in named_whole_parameters(model, self.scope):
            if name in wanted:
                weights[name] = weight
            for path, owner in unknown.items():
                if name.startswith(f"{path}."):
                    raise ValueError(
                        f"{self.name}: {path} ({owner}) has no plain linear projections for kind={self.kind!r} "
                        "(fused or adapted ones have no separate factors). Leave it out with `scope`, or use "
                        "kind='lora' on a model with LoRA adapters."
                    )
        terms = []
        for kind, found in products.items():
            inside = [product for product in found if product.names() <= weights.keys()]
            if not inside:
                raise ValueError(
                    f"{self.name}: no {kind!r} product of {type(model).__name__} has both factors in scope "
                    f"{self.scope!r} ({len(found)} found); 'lora' needs PEFT's LoRA layers, 'factorized' that patch, "
                    "'qk' and 'ov' trainable attention projections."
                )
            terms += [frobenius_product(*product.factors(weights)) * product.scale**2 for product in inside]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()
