"""Pairs of factors whose product is one map: LoRA's B A, and the query-key and output-value forms of a head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_reg.seams.factors import FactorizedLayer
from hf_reg.sites.attention import AttentionSite, find_attention


__all__ = ["Factor", "Product", "factorized_products", "head_products", "lora_products"]

QUERY, KEY = ("q_proj", "query", "q", "q_lin"), ("k_proj", "key", "k", "k_lin")
VALUE, OUTPUT = ("v_proj", "value", "v", "v_lin"), ("o_proj", "out_proj", "o", "out_lin", "output.dense")


@dataclass(frozen=True)
class Factor:
    """A parameter, or a third of one, as a matrix."""

    name: str
    transposed: bool = False
    third: int | None = None

    def read(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        matrix = weights[self.name].flatten(1)
        matrix = matrix.mT if self.transposed else matrix
        return matrix if self.third is None else matrix.chunk(3)[self.third]


@dataclass(frozen=True)
class Product:
    """scale * left^T right, for each head where there are several: left (heads * r, m), right (groups * r, n)."""

    path: str
    left: Factor
    right: Factor
    heads: int = 1
    groups: int = 1
    scale: float = 1.0

    def names(self) -> set[str]:
        return {self.left.name, self.right.name}

    def factors(self, weights: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(groups, heads / groups, m, r) and (groups, 1, n, r): u v^T is the product, shared factors broadcast.

        Raises:
            `ValueError`: if the shapes do not divide into the heads that the module has.
        """
        left, right = self.left.read(weights), self.right.read(weights)
        rank = left.shape[0] // self.heads
        if (rank * self.heads, rank * self.groups) != (left.shape[0], right.shape[0]):
            raise ValueError(
                f"{self.path}: {self.left.name} {tuple(left.shape)} and {self.right.name} {tuple(right.shape)} are "
                f"not {self.heads} heads over {self.groups} key/value heads of equal size; leave this kind out."
            )
        u = left.reshape(self.groups, self.heads // self.groups, rank, -1).mT
        v = right.reshape(self.groups, 1, rank, -1).mT
        return u, v


def lora_products(model: nn.Module) -> Iterator[Product]:
    """scaling * B A of the active adapters of PEFT's LoRA layers, linear, convolution (flattened) or embedding.

    For DoRA that is the product before its magnitude. AdaLoRA, whose product has three factors, is left out.
    """
    for path, module in model.named_modules():
        if not hasattr(module, "scaling") or not hasattr(module, "active_adapters"):
            continue
        for adapter in module.active_adapters:
            linear, embedding = getattr(module, "lora_A", {}), getattr(module, "lora_embedding_A", {})
            if isinstance(linear, nn.ModuleDict) and adapter in linear:
                a, b = f"{path}.lora_A.{adapter}.weight", f"{path}.lora_B.{adapter}.weight"
            elif adapter in embedding:
                a, b = f"{path}.lora_embedding_A.{adapter}", f"{path}.lora_embedding_B.{adapter}"
            else:
                continue
            yield Product(path, Factor(b, transposed=True), Factor(a), scale=module.scaling[adapter])


def factorized_products(model: nn.Module) -> Iterator[Product]:
    """U V^T of the layers under the patch `factorized`."""
    for path, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            yield Product(path, Factor(f"{path}.weight_u", transposed=True), Factor(f"{path}.weight_v"))


def _is_plain(model: nn.Module, path: str) -> bool:
    """Whether a linear layer, not one wrapped by an adapter, stands at `path`."""
    try:
        return type(model.get_submodule(path)) is nn.Linear
    except AttributeError:
        return False


def _find(model: nn.Module, site: AttentionSite, names: tuple[str, ...]) -> str | None:
    """Path of the plain linear projection of `site` that has one of `names`: its own, or a sibling (BERT's output)."""
    parent = site.path.rpartition(".")[0]
    paths = [(f"{parent}.{name}" if "." in name else f"{site.path}.{name}").lstrip(".") for name in names]
    return next((path for path in paths if _is_plain(model, path)), None)


def head_products(model: nn.Module, kind: str) -> Iterator[tuple[AttentionSite, Product | None]]:
    """`kind="qk"`: Q_h^T K_h of the heads of every attention module; `"ov"`: O_h V_h; None where there is none.

    Found: plain linear projections under their usual names, and GPT-2's fused `c_attn`.
    """
    for site in find_attention(model):
        heads, groups = site.heads or 1, site.groups or site.heads or 1
        names = (QUERY, KEY) if kind == "qk" else (OUTPUT, VALUE)
        first, second = (_find(model, site, choice) for choice in names)
        fused = getattr(site.module, "c_attn", None)
        if first and second:
            left = Factor(f"{first}.weight", transposed=kind == "ov")
            right = Factor(f"{second}.weight")
        elif isinstance(fused, Conv1D) and fused.weight.shape[1] == 3 * fused.weight.shape[0]:
            parts = [Factor(f"{site.path}.c_attn.weight", True, third) for third in range(3)]
            left, right = (parts[0], parts[1]) if kind == "qk" else (Factor(f"{site.path}.c_proj.weight"), parts[2])
        else:
            yield site, None
            continue
        yield site, Product(site.path, left, right, heads, groups)
