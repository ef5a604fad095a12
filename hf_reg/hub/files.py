"""What of a folder is pushed: plain files. The rest is left out or refused, by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ..distributed import GATHER
from ..training.callback import STATE


__all__ = ["LEFT_OUT", "PLAIN", "WEIGHTS", "refuse_secrets", "select"]

WEIGHTS = (".safetensors",)
TEXT = (".json", ".jinja", ".md", ".txt", ".yaml", ".yml")
PLAIN = (*WEIGHTS, *TEXT, ".model", ".png", ".tiktoken")  # .model: SentencePiece
NAMES = ("LICENSE", "NOTICE")
LEFT_OUT = (  # of a training run, and hidden
    ".*", "__pycache__", "*.partial", "_saving-*", "checkpoint-*", "global_step*", "optimizer.*", "optimizer_*",
    "pytorch_model_fsdp_*", "rng_state*.pth", "runs", "scaler.pt", "scheduler.pt", "trainer_state.json",
    "training_args.bin", STATE,
)  # fmt: skip
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")


def _entries(folder: Path, inside: str = "") -> Iterator[os.DirEntry[str]]:
    """Every file, and every folder that is left out or is a link, in order."""
    for entry in sorted(os.scandir(folder / inside), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False) and not _left_out(entry.name):
            yield from _entries(folder, f"{inside}{entry.name}/")
        else:
            yield entry


def _left_out(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in LEFT_OUT)


def select(folder: Path) -> tuple[list[str], list[str]]:
    """The files of `folder` to push, and what is left out, as paths inside it.

    Raises:
        `ValueError`: for pickles, scripts, links and other files that are not plain; for a folder without weights.
    """
    files, left_out, refused = [], [], []
    for entry in _entries(folder):
        path = Path(entry.path).relative_to(folder).as_posix()
        if _left_out(entry.name):
            left_out.append(path)
        elif entry.is_symlink():
            refused.append(f"{path} (a link)")
        elif entry.is_file() and (Path(path).suffix.lower() in PLAIN or entry.name in NAMES):
            files.append(path)
        else:
            refused.append(path)
    if refused:
        raise ValueError(
            f"{folder} holds files that are not pushed: {', '.join(refused)}. Expected {' '.join(PLAIN)}. Pickled "
            "weights become safetensors with save_pretrained; copy what a link leads to; move the rest elsewhere."
        )
    names = {Path(path).name for path in files}
    weights = any(path.endswith(WEIGHTS) for path in files)
    if not (weights and names & {"config.json", "adapter_config.json"}):
        raise ValueError(
            f"{folder} is no checkpoint (found {', '.join(files) or 'no file'}): expected config.json or "
            f"adapter_config.json, and weights in safetensors. Write them with save_pretrained. {GATHER}"
        )
    return files, left_out


def refuse_secrets(folder: Path, files: Iterable[str], token: str | None) -> None:
    """
    Raises:
        `ValueError`: if a text file holds the token of this push, or another of the Hub's. It is not repeated.
    """
    for path in files:
        if not path.endswith(TEXT):
            continue
        text = (folder / path).read_bytes()
        if TOKEN.search(text) or (token and token.encode() in text):
            raise ValueError(
                f"{path} holds an access token of the Hub, so nothing was sent. Take it out; if the file was ever "
                "shared, revoke the token on https://huggingface.co/settings/tokens."
            )
