"""`get_regularized_peft_model`, and the PEFT models it returns: stock ones that know how to keep an SVD adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.lora.layer import Linear
from torch import nn

from hf_reg.checkpoints.writing import replacing_checkpoint

from .config import SvdAdapterConfig
from .initialisation import initialise
from .linear import SvdLinear
from .rollback import unchanged_on_failure
from .storage import (
    holds_svd_adapter,
    layers_of,
    plain_config,
    plain_state_dict,
    read_config,
    restore,
    write_factors,
)


__all__ = ["get_regularized_peft_model"]


class _Regularized(PeftModel):
    """What a PEFT model needs beside its own methods when one of its adapters is an SVD adapter."""

    def _svd_adapters(self) -> dict[str, SvdAdapterConfig]:
        return {name: config for name, config in self.peft_config.items() if isinstance(config, SvdAdapterConfig)}

    def _keep_start_local(self) -> None:
        """DDP would broadcast the frozen first factors in every forward."""
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers() if ".lora_start." in name]

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """As in [`~peft.PeftModel`]; the factors of an SVD adapter are computed."""
        if not isinstance(peft_config, SvdAdapterConfig):
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)
            return
        with self._adding(adapter_name, peft_config, *args, **kwargs):
            initialise(self, adapter_name, peft_config)

    @contextmanager
    def _adding(self, adapter_name: str, config: SvdAdapterConfig, *args: Any, **kwargs: Any) -> Iterator[None]:
        """With the layers of a new adapter, which the body gives its factors."""
        known = dict(self.peft_config)
        try:
            with unchanged_on_failure(self):
                for module in self.modules():
                    if type(module) is Linear:
                        SvdLinear.of(module)
                super().add_adapter(adapter_name, config, *args, **kwargs)
                yield
        except BaseException:
            self.peft_config.clear()
            self.peft_config.update(known)
            raise
        self._keep_start_local()

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """As in [`~peft.PeftModel`]; a folder with hf_reg.json gives the factors that training goes on with."""
        if not holds_svd_adapter(model_id):
            if adapter_name in self._svd_adapters():
                read_config(model_id)  # says what is missing
            return super().load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        if kwargs:
            raise ValueError(f"load_adapter of {model_id}: {', '.join(kwargs)} cannot be given for an SVD adapter.")
        if adapter_name not in self.peft_config:
            config = read_config(model_id)
            config.inference_mode = not is_trainable
            with self._adding(adapter_name, config):
                restore(self, adapter_name, model_id, config.folded)
        else:
            config = self.peft_config[adapter_name]
            if not isinstance(config, SvdAdapterConfig) or config.METHOD != read_config(model_id).METHOD:
                raise ValueError(
                    f"{model_id} holds a {read_config(model_id).METHOD} adapter, but {adapter_name!r} is "
                    f"{type(config).__name__}. Load it under another name."
                )
            restore(self, adapter_name, model_id, config.folded)
        if not is_trainable:
            self.eval()
        return None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write plain LoRA adapters (SVD adapters at twice their rank, exactly equal) that stock PEFT loads, and
        beside each SVD adapter hf_reg.json and hf_reg.safetensors, with which training goes on. All take the place of
        an earlier checkpoint in one step: it stays whole if the process is killed before.

        Raises:
            `ValueError`: for `safe_serialization=False`, and where PEFT raises one.
        """
        ours = {
            name: config
            for name, config in self._svd_adapters().items()
            if selected_adapters is None or name in selected_adapters
        }
        if not safe_serialization:
            raise ValueError("safe_serialization=False would pickle the adapter: only safetensors are written.")
        if ours and kwargs.pop("path_initial_model_for_weight_conversion", None) is not None:
            raise ValueError(
                "path_initial_model_for_weight_conversion is for PiSSA; these adapters are always converted."
            )
        if ours and is_main_process:
            state = kwargs.pop("state_dict", None)
            state = self.state_dict() if state is None else state
            plain = state
            for name in ours:
                plain = plain_state_dict(self, name, plain)
            kwargs["state_dict"] = plain
        place = Path(save_directory)
        with replacing_checkpoint(place) if is_main_process else nullcontext(place) as folder:
            try:
                self.peft_config |= {name: plain_config(config) for name, config in ours.items()}
                super().save_pretrained(
                    str(folder),
                    selected_adapters=None if selected_adapters is None else list(selected_adapters),
                    save_embedding_layers=save_embedding_layers,
                    is_main_process=is_main_process,
                    **kwargs,
                )
            finally:
                self.peft_config |= ours
            if is_main_process:
                for name, config in ours.items():
                    write_factors(self, name, config, state, folder / ("" if name == "default" else name))

    def _unfold(self, names: Sequence[str] | None = None) -> None:
        for name in self._svd_adapters() if names is None else names:
            for _, layer in layers_of(self, name):
                layer.unfold(name)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in [`~peft.PeftModel`]."""
        if adapter_name in self.peft_config:
            self._unfold([adapter_name])
        super().delete_adapter(adapter_name)
        self._keep_start_local()

    def unload(self) -> nn.Module:
        """The base model without its adapters, as in [`~peft.LoraModel`]."""
        self._unfold()
        return self.base_model.unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base model with its active adapters added in fp32, as in [`~peft.LoraModel`]."""
        self._unfold()
        return self.base_model.merge_and_unload(*args, **kwargs)

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str,
        combination_type: str | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """As in [`~peft.LoraModel`]; with SVD adapters a plain LoRA that is the weighted sum exactly (ranks add up).

        Raises:
            `ValueError`: for another `combination_type` than `"cat"` when an SVD adapter takes part: the others mix or
                prune factors, of which an SVD adapter's mean nothing without what it started from.
        """
        if not any(name in self._svd_adapters() for name in adapters):
            kwargs |= {} if combination_type is None else {"combination_type": combination_type}
            self.base_model.add_weighted_adapter(adapters, weights, adapter_name, **kwargs)
            return
        if combination_type not in (None, "cat") or kwargs:
            raise ValueError(
                f"combination_type={combination_type!r} {sorted(kwargs)}: SVD adapters are combined with 'cat' only, "
                "which is exact. For another, save them and load the plain LoRA adapters with peft.PeftModel."
            )
        if len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: expected as many.")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"Unknown adapter {unknown[0]!r}. Known: {', '.join(self.peft_config)}.")
        parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for path, layer in self.named_modules():
            if not isinstance(layer, SvdLinear):
                continue
            for name, weight in zip(adapters, weights, strict=True):
                if name not in layer.lora_A:
                    continue
                down, up = (
                    layer.plain_factors(name)
                    if layer.is_svd(name)
                    else (layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name])
                )
                parts.setdefault(path, []).append((down.detach(), up.detach() * weight))
        ranks = {path.removeprefix("base_model.model."): sum(len(a) for a, _ in some) for path, some in parts.items()}
        first = self.peft_config[adapters[0]]
        config = LoraConfig(
            r=max(ranks.values()), lora_alpha=max(ranks.values()), rank_pattern=ranks, alpha_pattern=dict(ranks),
            target_modules=list(ranks), task_type=first.task_type,
            base_model_name_or_path=first.base_model_name_or_path, fan_in_fan_out=first.fan_in_fan_out,
        )  # fmt: skip
        super().add_adapter(adapter_name, config)
        with torch.no_grad():
            for path, some in parts.items():
                layer = self.get_submodule(path)
                layer.lora_A[adapter_name].weight.copy_(torch.cat([a for a, _ in some]))
                layer.lora_B[adapter_name].weight.copy_(torch.cat([b for _, b in some], dim=1))


def _regularized(cls: type[PeftModel]) -> type[PeftModel]:
    """The class of that name with the methods above, findable by pickle."""
    place = f"Regularized{cls.__name__}"
    names = {"__doc__": cls.__doc__, "__module__": __name__, "__qualname__": place}
    globals()[place] = made = type(cls.__name__, (_Regularized,) if cls is PeftModel else (_Regularized, cls), names)
    return made


CLASSES = {cls: _regularized(cls) for cls in (PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values())}


def get_regularized_peft_model(
    model: nn.Module,
    config: SvdAdapterConfig | str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
) -> PeftModel:
    """Add a SORSA or BA-LoRA adapter to a model.

    What it returns is PEFT's own model class and behaves as such (`disable_adapter`, several adapters,
    `merge_and_unload`, checkpointing, DDP, ...). `save_pretrained` writes plain LoRA that stock PEFT loads, and
    [`RegularizedTrainer`] adds the penalties of the method by itself.

    Args:
        model (`nn.Module`): a transformers model with its weights loaded, or a `PeftModel` with LoRA adapters.
        config ([`SorsaConfig`], [`BALoraConfig`], `str` or `PathLike`):
            The settings; or the folder of an adapter saved with `save_pretrained`, to go on training it: then nothing
            is decomposed.
        adapter_name (`str`, *optional*, defaults to `"default"`).
        autocast_adapter_dtype (`bool`, *optional*, defaults to `True`): factors in fp32 whatever the base's dtype.

    Returns:
        `PeftModel`: of the class that PEFT has for the task type.

    Raises:
        `TypeError`: for another configuration. `ValueError`: for layers that are neither Linear nor Conv1D, weights
            that cannot be decomposed (meta, ZeRO-3 shards, not finite), ranks out of range. The model is then as it
            was.
    """
    folder = None
    if isinstance(config, (str, os.PathLike)):
        folder, config = config, read_config(config)
    if not isinstance(config, SvdAdapterConfig):
        raise TypeError(
            f"config is {type(config).__name__}: expected SorsaConfig, BALoraConfig or the folder of a saved adapter. "
            "For other methods use peft.get_peft_model; RegularizedTrainer takes those too."
        )
    if isinstance(model, PeftModel):
        if type(model) in CLASSES:
            model.__class__ = CLASSES[type(model)]
        if folder is not None:
            model.load_adapter(str(folder), adapter_name, is_trainable=True)
        else:
            model.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)
        model.set_adapter(adapter_name)
        return model
    with unchanged_on_failure(model):
        made: Any = get_peft_model(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        made.__class__ = CLASSES[type(made)]
        if folder is None:
            initialise(made, adapter_name, config)
        else:
            restore(made, adapter_name, folder, config.folded)
    made._keep_start_local()
    return made
