"""A zoo of tiny models: one for every model type of the installed transformers, with inputs for a forward.

    tiny = build("llama")
    outputs = forward(tiny, tiny.inputs)

Everything is built from a configuration with random weights; nothing is downloaded.
`python -m tests.architectures [types...]` builds and runs them all.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from .configs import tiny_config
from .inputs import candidates


MODEL_TYPES: list[str] = sorted(CONFIG_MAPPING.keys())


# Level of `tiny_config` of those that do not run at level 0.
WIDE = """align align_vision_model bit clap clvp clvp_encoder deimv2 efficientloftr efficientnet fun_asr_nano
layoutlmv3 lightglue lilt mimi pocket_tts_audio_tokenizer pp_ocrv5_server_rec sam sam_hq superglue superpoint textnet
unlimited_ocr_vision csm mimi_decoder pocket_tts_audio_tokenizer_decoder"""
LEVELS: dict[str, int] = {**dict.fromkeys(WIDE.split(), 1), "donut-swin": 2}
MOST_PARAMETERS = 150_000_000


class NotBuilt(Exception):
    """There is no tiny model of this type, or no inputs are known that make its forward succeed."""


@dataclass
class Tiny:
    model_type: str
    model: PreTrainedModel
    inputs: dict[str, Any]
    pad_positions: Tensor | None = None  # (B, T), True at the padding of input_ids; None without a 2-D mask for them
    level: int = 0  # of `tiny_config`


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings; the default dtype and numpy's random state as before at the end."""
    verbosity = transformers.logging.get_verbosity()
    dtype = torch.get_default_dtype()
    numpy_state = np.random.get_state()  # SpecAugment draws its masks from numpy
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        torch.set_default_dtype(dtype)
        np.random.set_state(numpy_state)


def auto_mappings() -> list[dict[str, Any]]:
    names = sorted(n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("MAPPING_NAMES"))
    first = [
        "MODEL_MAPPING_NAMES",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    ]
    return [getattr(modeling_auto, n) for n in first + [n for n in names if n not in first]]


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """Classes whose configuration is that of `model_type`: the base model first, then those with a head."""
    config_class = CONFIG_MAPPING[model_type]
    names: list[str] = []
    for mapping in auto_mappings():
        found = mapping.get(model_type, ())
        names += [found] if isinstance(found, str) else list(found)
    classes = [getattr(transformers, name, None) for name in names]
    with contextlib.suppress(ImportError):
        module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
        classes += [c for c in vars(module).values() if isinstance(c, type)]
    kept: list[type[PreTrainedModel]] = []
    for cls in classes:
        with contextlib.suppress(ImportError):  # a class of a missing optional dependency is a stub
            if (
                cls is not None
                and cls not in kept
                and issubclass(cls, PreTrainedModel)
                and cls.config_class
                and (cls.config_class is config_class or cls.__name__ in names)
                and cls.forward is not torch.nn.Module.forward
            ):
                kept.append(cls)
    return kept


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for key, value in output.items():
            if key != "loss" and "past_key_values" not in key and "cache" not in key:
                yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def forward(model: Tiny | PreTrainedModel, inputs: dict[str, Any]) -> list[Tensor]:
    """All floating-point tensors of the output, without loss and caches."""
    if isinstance(model, Tiny):
        model = model.model
    with patch("torch.seed", _drawn):
        return list(tensors(model(**inputs)))


def _drawn() -> int:
    """`torch.seed` that repeats: Reformer seeds itself anew in every training step."""
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    return seed


def reason(error: BaseException) -> str:
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}")
        trace = trace.tb_next
    message = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}: {message} ({frames[-1] if frames else ''})"


def build(model_type: str, *, seed: int = 0, attn_implementation: str | None = None) -> Tiny:
    """The tiny model in train mode, its inputs checked by one forward; the same for the same seed."""
    with quiet(), torch.random.fork_rng(devices=[]):
        classes = model_classes(model_type)
        if not classes:
            raise NotBuilt("no PreTrainedModel class has this configuration")
        failures: list[str] = []
        for level in [LEVELS.get(model_type, 0)]:
            for cls in classes:
                tiny = attempt(model_type, cls, level, seed, attn_implementation, failures)
                if tiny is not None:
                    return tiny
        raise NotBuilt("; ".join(list(dict.fromkeys(failures))[:3]) or "no inputs")


def attempt(
    model_type: str, cls: type[PreTrainedModel], level: int, seed: int, attention: str | None, failures: list[str]
) -> Tiny | None:
    try:
        torch.manual_seed(seed)
        config = tiny_config(model_type, level)
        if level:
            with torch.device("meta"):
                size = sum(p.numel() for p in cls._from_config(copy.deepcopy(config)).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size} parameters are too many")
        kwargs = {} if attention is None else {"attn_implementation": attention}
        model = cls._from_config(config, **kwargs).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 3 and "experts" in name:  # some models leave these uninitialised
                    parameter.normal_(std=0.02)
    except Exception as error:
        failures.append(f"{cls.__name__}: {reason(error)}")
        return None
    torch.manual_seed(seed)
    np.random.seed(seed)
    for make in candidates(model):
        try:
            inputs = make()
            if not forward(model, inputs):
                raise ValueError("no floating-point output")
        except Exception as error:
            failures.append(f"level {level} {cls.__name__} forward: {reason(error)}")
            continue
        mask = inputs.get("attention_mask") if "input_ids" in inputs else None
        return Tiny(model_type, model, inputs, None if mask is None else mask == 0, level)
    return None


def check_all(types: Iterable[str] | None = None) -> dict[str, str]:
    """Builds and runs every type; prints a line for each and the totals, returns the reasons of the failures."""
    from transformers.modeling_utils import AttentionInterface

    calls = 0
    original = AttentionInterface.get_interface

    def counted(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        return original(self, *args, **kwargs)

    failed: dict[str, str] = {}
    through, started, total = 0, time.perf_counter(), 0
    AttentionInterface.get_interface = counted
    try:
        for model_type in types or MODEL_TYPES:
            total += 1
            begin, calls, line = time.perf_counter(), 0, "ok"
            try:
                tiny = build(model_type)
                calls = 0
                forward(tiny, tiny.inputs)
                through += calls > 0
                line = f"ok {type(tiny.model).__name__} interface={calls} inputs={','.join(tiny.inputs)}"
            except Exception as error:
                failed[model_type] = line = str(error)
            print(f"{model_type:40s} {time.perf_counter() - begin:6.2f}s  {line}", flush=True)
    finally:
        AttentionInterface.get_interface = original
    print(
        f"{total} types, {total - len(failed)} forward ok, {through} through the attention interface, "
        f"{len(failed)} failed, {time.perf_counter() - started:.0f}s"
    )
    return failed
