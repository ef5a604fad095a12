"""SVD adapters on disk: a plain LoRA that stock PEFT loads, and beside it the factors that training goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hf_reg.checkpoints.block import BLOCK, block_of
from hf_reg.files import replacing

from .balora import BALoraConfig
from .config import SvdAdapterConfig
from .linear import SvdLinear
from .sorsa import SorsaConfig


__all__ = [
    "CONFIGS", "holds_svd_adapter", "layers_of", "plain_config", "plain_state_dict", "read_config", "restore",
    "write_factors", "write_settings",
]  # fmt: skip

SETTINGS, FACTORS = "hf_reg.json", "hf_reg.safetensors"
CONFIGS: dict[str, type[SvdAdapterConfig]] = {cls.METHOD: cls for cls in (SorsaConfig, BALoraConfig)}


def layers_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SvdLinear]]:
    """The layers that carry the SVD adapter of this name."""
    for path, module in model.named_modules():
        if isinstance(module, SvdLinear) and module.is_svd(adapter_name):
            yield path, module


def plain_config(config: SvdAdapterConfig) -> LoraConfig:
    """The configuration of the same adapter as plain LoRA: twice the rank, scaling 1."""
    kept = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
    ranks = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    twice = {"r": 2 * config.r, "lora_alpha": 2 * config.r, "rank_pattern": ranks, "alpha_pattern": dict(ranks)}
    return LoraConfig(**kept | twice | {"use_rslora": False, "init_lora_weights": True})


def _gathered(layer: SvdLinear, path: str, adapter_name: str, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The factors of a layer as a state dict of the whole model holds them."""
    keys = {"lora_A": f"{path}.lora_A.{adapter_name}.weight", "lora_B": f"{path}.lora_B.{adapter_name}.weight"}
    if adapter_name in layer.lora_S:
        keys["lora_S"] = f"{path}.lora_S.{adapter_name}"
    if missing := [key for key in keys.values() if key not in state]:
        raise ValueError(f"The state dict to save lacks {missing[0]}: pass that of the whole PeftModel, or none.")
    return {name: state[key] for name, key in keys.items()}


def plain_state_dict(model: nn.Module, adapter_name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state`, of the whole model, with the adapter as plain LoRA."""
    plain = dict(state)
    for path, layer in layers_of(model, adapter_name):
        down, up = layer.plain_factors(adapter_name, _gathered(layer, path, adapter_name, state))
        plain[f"{path}.lora_A.{adapter_name}.weight"] = down
        plain[f"{path}.lora_B.{adapter_name}.weight"] = up
        plain.pop(f"{path}.lora_S.{adapter_name}", None)
    return plain


def write_factors(
    model: nn.Module, adapter_name: str, config: SvdAdapterConfig, state: Mapping[str, Any], folder: Path
) -> None:
    """`hf_reg.json`, the settings, and `hf_reg.safetensors`, the factors as they are and as they started."""
    tensors = {}
    for path, layer in layers_of(model, adapter_name):
        start = layer.start_of(adapter_name)
        own = _gathered(layer, path, adapter_name, state)
        first: dict[str, Any] = {"lora_A": start.a, "lora_B": start.b, "lora_S": start.values}
        for name, tensor in own.items():
            tensors[f"{path}.{name}"] = tensor.detach().cpu().contiguous()
            tensors[f"{path}.start.{name}"] = first[name].detach().cpu().contiguous()
    with replacing(folder / FACTORS) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    write_settings(model, folder, method=config.METHOD, settings=config.settings())


def write_settings(model: Any, folder: Path, **settings: Any) -> None:
    """`hf_reg.json`: `settings`, and what else regularized the model, if anything did."""
    from hf_reg import __version__

    block = block_of(model.get_base_model())
    found = {"hf_reg_version": __version__} | settings | ({} if block is None else {BLOCK: block})
    with replacing(folder / SETTINGS) as unfinished:
        unfinished.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")


def holds_svd_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a SORSA or BA-LoRA adapter; beside a plain one hf_reg.json names the training alone."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        return False
    try:
        return set(json.loads(path.read_text())) != {"hf_reg_version", BLOCK}
    except (ValueError, TypeError):
        return True  # reading it says what is wrong


def read_config(folder: str | os.PathLike[str]) -> SvdAdapterConfig:
    """The configuration that an adapter was saved with.

    Raises:
        `ValueError`: if the folder holds none, or one that this version does not know.
    """
    path = Path(folder) / SETTINGS
    if not holds_svd_adapter(folder):
        raise ValueError(
            f"{folder} holds no {SETTINGS}: expected a folder that save_pretrained of a SORSA or BA-LoRA model wrote. "
            "Plain adapters load with peft.PeftModel.from_pretrained."
        )
    try:
        recipe = json.loads(path.read_text())
        method, settings = recipe["method"], recipe["settings"]
        return CONFIGS[method](**settings)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no recipe of this version ({type(error).__name__}: {error}): expected 'method' (one of "
            f"{', '.join(CONFIGS)}) and 'settings'. Was it written by a newer hf_reg?"
        ) from error


def restore(model: nn.Module, adapter_name: str, folder: str | os.PathLike[str], folded: bool) -> None:
    """Give an adapter the factors, and everything else it trains, that `folder` holds. Nothing is decomposed.

    Raises:
        `ValueError`: if the files do not fit the adapter; it is left as it was.
    """
    path = Path(folder) / FACTORS
    try:
        saved = load_file(path)
        others = load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the adapter cannot be read ({error}).") from error
    layers = dict(layers_of(model, adapter_name))
    wanted = {}
    for name, layer in layers.items():
        for factor, parameter in layer.parameters_of(adapter_name).items():
            wanted[f"{name}.{factor}"] = wanted[f"{name}.start.{factor}"] = tuple(parameter.shape)
    found = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    if found != wanted:
        key = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))[0]
        raise ValueError(
            f"{path} does not fit adapter {adapter_name!r}: {key} is {found.get(key, 'missing')} there and "
            f"{wanted.get(key, 'missing')} here. Load it with the configuration that it was saved with: "
            "get_regularized_peft_model(model, folder)."
        )
    others = {key: tensor for key, tensor in others.items() if ".lora_A." not in key and ".lora_B." not in key}
    if others:
        set_peft_model_state_dict(model, others, adapter_name=adapter_name)
    for name, layer in layers.items():
        names = layer.parameters_of(adapter_name)
        layer.restore(
            adapter_name,
            {factor: saved[f"{name}.{factor}"] for factor in names},
            {factor: saved[f"{name}.start.{factor}"] for factor in names},
            folded,
        )
