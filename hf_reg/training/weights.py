"""Runs whose layers train other tensors than their weights: what is beside a checkpoint, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import replacing
from ..patching import patch_model
from ..seams.reparameterized import named_layers
from .saving import SavingMixin


__all__ = ["TENSORS", "WeightsMixin"]

TENSORS = "hf_reg_weights.safetensors"  # beside model.safetensors in a checkpoint-*: what a resumed run trains on


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{path}.{name}": tensor for path, layer in named_layers(model) for name, tensor in layer.own().items()}


class WeightsMixin(SavingMixin):
    """Checkpoints of a run hold the trained tensors too, since a dense weight does not give them back exactly; a
    resumed run gets them, or is refused. Penalties say which parameters weight decay leaves alone."""

    model: Any
    _patches: Any
    _penalties: Any

    def _attach_patches(self) -> None:
        """Once the penalties are ready, which may refuse; they begin anew from the parameters that are trained."""
        layer = next((f"at {path}" for path, _ in named_layers(self.bare_model)), None)
        replacing = [patch.name for patch in self._patches or () if patch.replaces_parameters]
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        zero3 = self.is_deepspeed_enabled and getattr(plugin, "zero_stage", 0) == 3
        if (replacing or layer) and (self.is_fsdp_enabled or zero3):
            raise ValueError(
                f"{', '.join(replacing) or f'The patch {layer}'} trains other tensors in place of the weights, which "
                f"{'ZeRO-3' if zero3 else 'FSDP'} would shard and save as they are. Use DDP or ZeRO-1 / 2, or leave "
                "the patch out."
            )
        if self._patches:
            patch_model(self.model, self._patches)
        if replacing:
            self._penalties.prepare(self.bare_model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        spared = {name for penalty in self._penalties.penalties for name in penalty.undecayed(self.bare_model)}
        return [name for name in super().get_decay_parameter_names(model) if name not in spared]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if not self.args.should_save or not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(self.bare_model).items()}
        if not tensors:
            (folder / TENSORS).unlink(missing_ok=True)
            return
        with replacing(folder / TENSORS) as unfinished:
            save_file(tensors, unfinished, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        path = Path(resume_from_checkpoint) / TENSORS
        saved, layers = load_file(path) if path.is_file() else {}, dict(named_layers(self.bare_model))
        wanted = {key: tuple(tensor.shape) for key, tensor in _tensors(self.bare_model).items()}
        found = {key: tuple(tensor.shape) for key, tensor in saved.items()}
        differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if differing:
            raise ValueError(
                f"{path} does not fit the patches of this run: {differing[0]} is {found.get(differing[0], 'missing')} "
                f"there and {wanted.get(differing[0], 'missing')} here. Resume with the patches that the checkpoint "
                "was written with; to begin anew from its weights, load them without resume_from_checkpoint."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        for name, layer in layers.items():
            layer.put({key: saved[f"{name}.{key}"] for key in layer.own()})
