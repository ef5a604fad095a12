"""A checkpoint as a process without hf_reg loads it. Run as a script, so nothing here may import hf_reg."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


__all__ = ["OUTPUTS", "PROBE", "RESULT", "load_stock", "make_probe", "outputs_of"]

PROBE, OUTPUTS, RESULT = "probe.safetensors", "outputs.safetensors", "result.json"
LENGTH = 16  # tokens of the probe
SHOWN = 3  # tensors of a wrong shape in an error


def make_probe(model: Any) -> dict[str, torch.Tensor]:
    """A small batch of random inputs, the same for the same configuration.

    Returns:
        `input_ids` (1, 16), and `decoder_input_ids` of an encoder-decoder; or `pixel_values` (1, C, H, W).

    Raises:
        `ValueError`: for a model that takes anything else.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {name: torch.randn(1, getattr(config, "num_channels", 3), height, width, generator=generator)}
    text = config.get_text_config()
    if name != "input_ids" or getattr(text, "vocab_size", None) is None:
        raise ValueError(f"{type(model).__name__} takes {name}, for which no probe can be made up. Pass probe=.")
    length = min(LENGTH, getattr(text, "max_position_embeddings", None) or LENGTH)
    ids = torch.randint(0, text.vocab_size, (1, length), generator=generator)
    return {"input_ids": ids} | ({"decoder_input_ids": ids.clone()} if config.is_encoder_decoder else {})


def outputs_of(model: nn.Module, probe: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every floating-point tensor that a model in eval mode returns, on the CPU; the logits alone where there are."""
    device = next(model.parameters()).device
    with torch.no_grad():
        found = model(**{name: tensor.to(device) for name, tensor in probe.items()})
    named = {name: one for name, one in found.items() if isinstance(one, torch.Tensor) and one.is_floating_point()}
    named = {"logits": named["logits"]} if "logits" in named else named
    if not named:
        raise ValueError(f"{type(model).__name__} returns no tensor for the probe.")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


def _tied(model: Any) -> tuple[list[str], list[str]]:
    """Names of the weights that the configuration ties to another: those that are one tensor with it, and not."""
    found: tuple[list[str], list[str]] = [], []
    for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        found[model.get_parameter(name) is not model.get_parameter(source)].append(name)
    return found


def load_stock(loader: Any, place: Any, **settings: Any) -> Any:
    """What `loader.from_pretrained` makes of the safetensors in a folder, running no code of it.

    Raises:
        `ValueError`: for tensors of other shapes than the configuration says, where transformers only logs which.
    """
    safe = {"use_safetensors": True, "trust_remote_code": False}
    try:
        return loader.from_pretrained(place, **safe, **settings)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        without = {"device_map": "meta", "ignore_mismatched_sizes": True, "output_loading_info": True}
        _, info = loader.from_pretrained(place, **safe, **{**settings, **without})  # of any size: no memory is taken
        wrong = [
            f"{name} is {list(found)}, expected {list(expected)}"
            for name, found, expected in sorted(info["mismatched_keys"], key=lambda one: str(one[0]))
        ]
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"{place}: the weights do not fit its config.json: {'; '.join(wrong[:SHOWN])}{more}. One of the two files "
            "is of another model."
        ) from error


def _load(request: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    loader, base, adapter = (request[key] for key in ("loader", "base", "adapter"))
    model, info = load_stock(getattr(transformers, loader), base, output_loading_info=True)
    tied, untied = _tied(model)
    found = {
        "missing": sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "adapter": adapter is not None,
        "tied": tied,
        "untied": untied,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if adapter is not None:
        from peft import PeftModel, get_peft_model_state_dict

        model = PeftModel.from_pretrained(model, adapter)
        with safe_open(Path(adapter) / "adapter_model.safetensors", framework="pt") as file:
            stored = set(file.keys())
        expected = set(get_peft_model_state_dict(model))
        found |= {"missing": sorted(expected - stored), "unexpected": sorted(stored - expected)}
    return model.eval(), found


def main(folder: Path) -> None:
    """Answer `request.json` in `folder`: `result.json`, the probe and the outputs for it."""
    model, found = _load(json.loads((folder / "request.json").read_text()))
    values = model.state_dict().items()
    found["infinite"] = [name for name, one in values if one.is_floating_point() and not one.isfinite().all()]
    if not (folder / PROBE).is_file():
        save_file(make_probe(model), folder / PROBE)
    save_file(outputs_of(model, load_file(folder / PROBE)), folder / OUTPUTS)
    (folder / RESULT).write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
