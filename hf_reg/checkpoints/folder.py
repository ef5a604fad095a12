"""The folder of a checkpoint: where it comes from, and what in it is not read or should not be passed on."""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from safetensors import SafetensorError, safe_open

from ..json_text import read_json
from .block import BLOCK


__all__ = ["ADAPTER", "CONFIG", "HUB", "check_folder", "fetch", "find_problems", "read_folder_block", "weight_files"]

CONFIG, ADAPTER, SETTINGS = "config.json", "adapter_config.json", "hf_reg.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_INDEX = 100_000_000  # bytes
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")  # arguments of a repository
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
CODE = (".bat", ".dll", ".dylib", ".exe", ".ps1", ".py", ".pyc", ".sh", ".so")
ARGUMENTS = "training_args.bin"  # Trainer pickles its arguments beside the model; no loader reads them
LEFT_OUT = re.compile(r"checkpoint-\d+|runs|_saving-.*|\.git|\.cache")  # folders that are no part of a checkpoint
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")


def fetch(path_or_repo: str | os.PathLike[str], **hub: Any) -> Path:
    """The folder itself, or the JSON and safetensors files of a repository of the Hub.

    Raises:
        `ValueError`: for what is neither. `OSError`: for a repository that cannot be downloaded.
    """
    folder, name = Path(path_or_repo).expanduser(), os.fspath(path_or_repo)
    if folder.is_dir():
        if hub:
            raise ValueError(f"{', '.join(sorted(hub))}: for a repository of the Hub, but {folder} is a folder.")
        return folder
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder nor a repository of the Hub (OWNER/NAME).") from error
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], **hub))


def _inside(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", value, re.ASCII) is not None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        `ValueError`: if there are none, or the index names a file outside the folder or one that is not there.
    """
    adapter = (folder / ADAPTER).is_file()
    single = folder / (ADAPTER_WEIGHTS if adapter else WEIGHTS)
    if single.is_file():
        return [single]
    index = folder / INDEX
    if adapter or not index.is_file():
        others = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES and path.name != ARGUMENTS]
        found = f"only {', '.join(others)}, which may run code when it is read" if others else "no weights"
        raise ValueError(
            f"{folder} holds {found}. Only safetensors are read: expected {single.name}. Save it again with "
            "save_pretrained of a current transformers or peft."
        )
    files = read_json(index, LARGEST_INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map of tensors to files.")
    if outside := [name for name in files.values() if not _inside(name)]:
        raise ValueError(f"{index} names {str(outside[0])[:80]!r}; expected names of safetensors files in the folder.")
    if missing := sorted({name for name in files.values() if not (folder / name).is_file()}):
        raise ValueError(f"{index} names {missing[0]}, which is not in the folder.")
    return [folder / name for name in sorted(set(files.values()))]


def _refuse_names(value: Any, path: Path) -> None:
    """Refuse what transformers and peft would follow out of the folder: kernels, other files, modules to import."""
    if isinstance(value, list):
        for one in value:
            _refuse_names(one, path)
    if not isinstance(value, dict):
        return
    for key, one in value.items():
        named = list(one.values()) if isinstance(one, dict) else [one]
        if "implementation" in key and any(re.search(r"[/:]", str(value)) for value in named):
            raise ValueError(f"{path}: {key}={str(one)[:80]!r} names code of the Hub, which is not run. Take it out.")
        if key == "transformers_weights" and one is not None and not _inside(one):
            raise ValueError(f"{path}: {key}={str(one)[:80]!r}; expected a safetensors file in the folder.")
        if key in ("configuration_files", "megatron_config") and one:
            raise ValueError(f"{path}: {key} makes further files or modules load, which is not done. Take it out.")
        _refuse_names(one, path)


def check_folder(folder: Path) -> dict[str, Any]:
    """The configuration of a checkpoint whose files can be read without running anything that they hold.

    Raises:
        `ValueError`: for anything else.
    """
    path = folder / (ADAPTER if (folder / ADAPTER).is_file() else CONFIG)
    if not path.is_file():
        raise ValueError(f"{folder} holds neither {CONFIG} nor {ADAPTER}: it is no checkpoint.")
    for name in (CONFIG, ADAPTER, SETTINGS):
        if (folder / name).is_file():
            _refuse_names(read_json(folder / name), folder / name)
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file: {error}.") from error
    found = read_json(path)
    if path.name == ADAPTER and found.get("peft_type") != "LORA":
        kind = str(found.get("peft_type"))[:80]
        raise ValueError(f"{path}: peft_type is {kind!r}; expected 'LORA'. Load other adapters with peft.")
    return found


def read_folder_block(folder: Path) -> Any:
    """The `hf_reg` block of a checkpoint as it is on disk, or None."""
    path = folder / (SETTINGS if (folder / ADAPTER).is_file() else CONFIG)
    return read_json(path).get(BLOCK) if path.is_file() else None


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir():
            yield path
        elif not LEFT_OUT.fullmatch(path.name):
            yield from _files(path)


def _holds_token(path: Path) -> bool:
    """Whether pickled training arguments hold a token; they are scanned, not loaded."""
    if TOKEN.search(path.read_bytes()):
        return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                steps = [arg for code, arg, _ in pickletools.genops(archive.read(name)) if "PUT" not in code.name]
                values = [after for key, after in zip(steps, steps[1:], strict=False) if str(key).endswith("_token")]
                if any(isinstance(value, str) for value in values):
                    return True
    return False


def find_problems(folder: Path) -> list[str]:
    """What in a checkpoint should not be passed on: pickles, tokens, programs, links that lead out of it."""
    root = folder.resolve()
    cached = root.parent.name == "snapshots"  # of the cache of the Hub, which links to its own files
    roots = (root, root.parents[1] / "blobs") if cached else (root,)
    problems = []
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if not any(path.resolve().is_relative_to(place) for place in roots):
            problems.append(f"{name} is a link out of the folder")
        elif not path.is_file():
            problems.append(f"{name} is no file")
        elif path.name == ARGUMENTS:
            if _holds_token(path):
                problems.append(f"{name} holds a token: delete the file, and revoke the token if it was uploaded")
        elif path.suffix in PICKLES:
            problems.append(f"{name} is a pickle, which may run code when it is read")
        elif path.suffix in CODE or path.stat().st_mode & 0o111:
            problems.append(f"{name} is executable")
    return problems
