"""`hf-reg merge ADAPTER OUTPUT`: an adapter merged into its base model in fp32, as a stock model in a folder."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from rich.console import Group, RenderableType
from rich.text import Text
from safetensors import safe_open

from ..adapters import MergeReport, merge_adapter
from ..checkpoints.loading import TASKS
from ..json_text import check_size
from ..runs.errors import RunError, UseError, refused_as_run
from ..tables import Shown


__all__ = ["Merged", "merge_folder", "replacing_folder"]

HEADS = ("classifier.out_proj.weight", "classifier.weight", "score.weight")  # whose rows are the classes
SETTINGS, WEIGHTS, CONFIG = "adapter_config.json", "adapter_model.safetensors", "config.json"


@dataclass(frozen=True)
class Merged(Shown):
    """What [`merge_folder`] did.

    Attributes:
        output, base (`str`): where the model is, and what the adapter was merged into.
        architecture (`str`): the class of the model.
        tokenizer (`str`, *optional*): whose it is, `"adapter"` or `"base"`; `None` if neither has one.
        report ([`MergeReport`]): how far merged and unmerged model are apart.
    """

    output: str
    base: str
    architecture: str
    tokenizer: str | None
    report: MergeReport

    def as_json(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {**asdict(self), "report": {**asdict(self.report), "dtype": str(self.report.dtype)}}

    def _table(self) -> RenderableType:
        whose = f"the tokenizer of the {self.tokenizer}" if self.tokenizer else "no tokenizer: neither has one"
        lines = f"{self.architecture} of {self.base}, merged in fp32, with {whose}.\nThe model is in {self.output}."
        return Group(self.report._table(), Text(lines))


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to write to; it takes the place of `path` when the body is through, if it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    unfinished.mkdir()
    try:
        yield unfinished
        if path.exists():
            os.replace(path, old)
        os.replace(unfinished, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_output(adapter: Path, base: str, output: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UseError(f"OUTPUT: {str(output)!r} is a file. Give a folder.")
    target = output.resolve()
    for read in (adapter, Path(base).expanduser()):
        if read.exists() and (target == read.resolve() or target in read.resolve().parents):
            raise UseError(f"OUTPUT: {str(output)!r} holds {str(read)!r}, which is read. Give another folder.")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise UseError(f"OUTPUT: {str(output)!r} is not empty. Give another folder, or --force to replace it.")
        if not (output / CONFIG).is_file():
            raise UseError(f"OUTPUT: {str(output)!r} holds other things than a model; --force replaces models only.")


def _settings(adapter: Path) -> PeftConfig:
    if not (adapter / SETTINGS).is_file():
        found = "is not there" if not adapter.exists() else f"has no {SETTINGS}"
        raise UseError(f"ADAPTER: {str(adapter)!r} {found}. Give a folder that save_pretrained of an adapter wrote.")
    if not (adapter / WEIGHTS).is_file():
        raise UseError(f"ADAPTER: {str(adapter)!r} has no {WEIGHTS}. Only safetensors are read: save it again.")
    with refused_as_run(f"{adapter / SETTINGS} cannot be read", (Exception,)):
        check_size(adapter / SETTINGS)
        return PeftConfig.from_pretrained(str(adapter))


def _auto_class(settings: PeftConfig, adapter: Path) -> Any:
    own = (settings.auto_mapping or {}).get("base_model_class") if settings.auto_mapping else None
    name = TASKS.get(str(getattr(settings.task_type, "value", settings.task_type)), own)
    cls = getattr(transformers, name, None) if name else None
    if cls is None:
        raise RunError(
            f"{adapter / SETTINGS}: task_type {settings.task_type!r} says no class of transformers"
            f"{f' (nor does {name})' if name else ''}. Known: {', '.join(TASKS)}."
        )
    return cls


def _classes(adapter: Path) -> dict[str, int]:
    """The number of classes of a head that was saved with the adapter."""
    with safe_open(adapter / WEIGHTS, "pt") as file:
        for key in file.keys():
            if key.endswith(HEADS) and "lora_" not in key:
                return {"num_labels": file.get_slice(key).get_shape()[0]}
    return {}


def _probe(model: Any) -> dict[str, torch.Tensor] | None:
    """For encoder-decoders, which take more than `input_ids`; `None`: what `merge_adapter` makes up."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    parts = [model.config, *(getattr(model.config, name, None) for name in ("encoder", "decoder"))]
    vocabularies = [size for part in parts if isinstance(size := getattr(part, "vocab_size", None), int)]
    if not vocabularies:
        return None
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(0, min(vocabularies), (2, 32), generator=generator) for _ in range(2))
    return {"input_ids": source, "decoder_input_ids": target}


def _save_tokenizer(adapter: Path, base: str, folder: Path) -> str | None:
    from transformers import AutoTokenizer

    for whose, place in {"adapter": str(adapter), "base": os.path.expanduser(base)}.items():
        if os.path.isdir(place) and not (Path(place) / "tokenizer_config.json").is_file():
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError, KeyError):
            if whose == "adapter":
                raise
            return None
        tokenizer.save_pretrained(folder)
        return whose
    return None


def merge_folder(adapter: Path, output: Path, base: str | None = None, *, force: bool = False) -> Merged:
    """Merge the adapter in a folder into its base model in fp32, and save that as a stock model.

    Args:
        adapter (`Path`): what `save_pretrained` of an adapter wrote.
        output (`Path`): a folder that is empty or not there; it is there whole or not at all.
        base (`str`, *optional*): folder or name of the base model; `None`: the one that the adapter names.
        force (`bool`, *optional*, defaults to `False`): replace a model that is in `output`.

    Returns:
        [`Merged`]: `print` it.

    Raises:
        [`UseError`]: for folders that cannot be read or must not be written. [`RunError`]: if the model cannot be
            loaded, or the merged one is not the same.
    """
    settings = _settings(adapter)
    revision = "main" if base else settings.revision or "main"
    base = base or settings.base_model_name_or_path
    if not base:
        raise UseError(f"{adapter / SETTINGS} names no base model. Give --base.")
    if base.startswith((".", "/", "~")) and not Path(base).expanduser().is_dir():
        raise UseError(f"the base model {base!r} is no folder here. Give --base, a folder or a name on the Hub.")
    _check_output(adapter, base, output, force)
    cls = _auto_class(settings, adapter)
    with refused_as_run(f"the base model {base} cannot be loaded"):
        model = cls.from_pretrained(
            os.path.expanduser(base), revision=revision, dtype=torch.float32,
            trust_remote_code=False, **_classes(adapter),
        )  # fmt: skip
    with refused_as_run(f"the adapter {adapter} cannot be put on {base}"):
        adapted = PeftModel.from_pretrained(model, str(adapter))
    with refused_as_run("the adapter cannot be merged"):
        merged, report = merge_adapter(adapted, _probe(model))
    with refused_as_run(f"{output} cannot be written"), replacing_folder(output) as folder:
        merged.save_pretrained(folder)  # type: ignore[operator]
        tokenizer = _save_tokenizer(adapter, base, folder)
    return Merged(str(output), base, type(merged).__name__, tokenizer, report)
