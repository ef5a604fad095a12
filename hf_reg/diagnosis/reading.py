"""What is known of a run: its logs, and what its configuration says; from a folder, or from a trainer in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.block import block_of
from ..checkpoints.folder import ADAPTER, CONFIG, read_folder_block
from ..checkpoints.reading import read_block
from ..json_text import read_json
from ..names import shown


__all__ = ["STATE", "RunRecord", "read_run"]

STATE = "trainer_state.json"
LARGEST_STATE = 100_000_000  # bytes; a log a step has about 200, so this is half a million steps. Our choice
NUMBERS = ("step", "loss", "loss_task", "eval_loss")  # what has to be a number where it is logged
DROP = re.compile(r"drop", re.IGNORECASE)
NO_DROPOUT = re.compile(r"layer_?drop|path", re.IGNORECASE)  # whole layers are left out


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run.

    Args:
        source (`str`): where it was read.
        history (`list`): its logs up to the end of training, numbers only.
        patches (`dict`): settings of the patches that it was trained with, by name.
        penalties (`dict`): settings of its penalties, by name.
        dropout (`dict`, *optional*): the dropout fields of the model's configuration; `None`: not known.
        weight_decay (`float`, *optional*): `None`: not known.
        remarks (`list` of `str`): what was left out in reading.
    """

    source: str
    history: list[dict[str, float]]
    patches: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    penalties: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    dropout: dict[str, float] | None = None
    weight_decay: float | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its folder, for a title."""
        path = Path(self.source)
        if path.suffix != ".json":
            return self.source
        inside = re.fullmatch(r"checkpoint-\d+", path.parent.name)
        return "/".join(path.absolute().parts[-3 if inside else -2 : -1])


def _is_number(value: Any) -> bool:
    """Also NaN and infinity; integers as far as a float holds them."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1000)


def _history(logs: Any, source: str) -> list[dict[str, float]]:
    """The logs up to the end of training: what is evaluated later may be another checkpoint, loaded since."""
    if not isinstance(logs, Sequence) or isinstance(logs, str):
        raise ValueError(f"{source}: log_history is {shown(logs)}; expected the list that Trainer writes.")
    found: list[dict[str, float]] = []
    before = 0.0
    for number, log in enumerate(logs, 1):
        if not isinstance(log, Mapping) or not all(isinstance(key, str) for key in log):
            raise ValueError(f"{source}: log {number} is {shown(log)}; expected an object of names and numbers.")
        for name in NUMBERS:
            if name in log and not _is_number(log[name]):
                raise ValueError(f"{source}: log {number} has {name}={shown(log[name])}; expected a number.")
        step = log.get("step", before)
        if not before <= step < 2**53:
            raise ValueError(
                f"{source}: log {number} is of step {step} and the one before of step {before:g}: these are not the "
                "logs of one run. Give those of one."
            )
        before = step
        if "train_runtime" in log:
            break
        found.append({key: float(value) for key, value in log.items() if _is_number(value)})
    return found


def _dropout_fields(config: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in ((str(key), value) for key, value in config.items()):
        if isinstance(value, Mapping) and name != "hf_reg":
            yield from _dropout_fields(value, f"{prefix}{name}.")
        elif DROP.search(name) and not NO_DROPOUT.search(name) and _is_number(value):
            yield prefix + name, float(value)


def _regularizers(block: Any) -> tuple[dict[str, Mapping[str, Any]], dict[str, Mapping[str, Any]]]:
    """Patches and penalties of an `hf_reg` block, by name."""
    patches: dict[str, Mapping[str, Any]] = {patch.name: patch.settings() for patch in read_block(block).patches}
    return patches, dict(block["penalties"])


def _states(folder: Path) -> list[tuple[int, Path]]:
    """The state files of a run and their steps as the folders say it; -1 is the run's own."""
    found = [(-1, folder / STATE)]
    for path in folder.glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d{1,15})", path.name):
            found.append((int(match[1]), path / STATE))
    return [(step, path) for step, path in sorted(found) if path.is_file()]


def _whole_state(path: Path) -> dict[str, Any]:
    state = read_json(path, LARGEST_STATE, finite=False)
    if "log_history" not in state or not isinstance(state.get("global_step"), int):
        raise ValueError(f"{path} is no state of a Trainer: it has no log_history, or no global_step.")
    return state


def _newest(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The whole state with the most steps."""
    files = _states(folder)
    if not files:
        inside = [path.name for path in sorted(folder.iterdir())[:8]]
        raise ValueError(
            f"{folder} has no {STATE}, nor has a checkpoint-* in it; it holds {', '.join(inside) or 'nothing'}. Give "
            "the output_dir of a Trainer that saved a checkpoint (save_strategy), or call trainer.save_state()."
        )
    whole: list[tuple[int, Path, dict[str, Any]]] = []
    remarks, first = [], None
    for _, path in files:
        try:
            state = _whole_state(path)
        except (OSError, ValueError) as error:
            first = first or error
            remarks.append(f"{path.relative_to(folder)} was left out, it cannot be read: {error}")
        else:
            whole.append((state["global_step"], path, state))
    if not whole:
        raise ValueError(f"no {STATE} in {folder} can be read: {first}") from first
    _, chosen, state = max(whole, key=lambda one: one[0])
    written = chosen.stat().st_mtime
    for step, path, _ in whole:
        if path.stat().st_mtime > written + 1 and step < state["global_step"]:
            remarks.append(
                f"{path.relative_to(folder)} (step {step}) is newer than {chosen.relative_to(folder)} (step "
                f"{state['global_step']}), which was read: of another run? Then give that folder itself."
            )
    return chosen, state, remarks


def _from_folder(path: Path) -> RunRecord:
    if path.is_dir():
        file, state, remarks = _newest(path)
    elif path.is_file():
        file, state, remarks = path, _whole_state(path), []
    else:
        raise ValueError(f"there is no {str(path)!r} (looked in {Path.cwd()}). Give the output folder of a Trainer.")
    places = [file.parent, *([path] if path.is_dir() else []), *(p.parent for _, p in reversed(_states(file.parent)))]
    patches: dict[str, Mapping[str, Any]] = {}
    penalties: dict[str, Mapping[str, Any]] = {}
    dropout = None
    for place in places:
        if not ((place / CONFIG).is_file() or (place / ADAPTER).is_file()):
            continue
        try:
            if not (place / ADAPTER).is_file():
                dropout = dict(_dropout_fields(read_json(place / CONFIG)))
            block = read_folder_block(place)
            if block is not None:
                patches, penalties = _regularizers(block)
        except (OSError, ValueError) as error:
            remarks.append(f"what the configuration in {place} says was left out: {error}")
        break
    return RunRecord(str(file), _history(state["log_history"], str(file)), patches, penalties, dropout, None, remarks)


def _from_trainer(run: Any, logs: Any) -> RunRecord:
    name = type(run).__name__
    history = _history(logs, name)
    if not hasattr(run, "accelerator"):
        return RunRecord(name, history)
    model = run.accelerator.unwrap_model(run.model, keep_torch_compile=False)
    bare = getattr(model, "get_base_model", lambda: model)()
    block = block_of(bare)
    patches, penalties = _regularizers(block) if block is not None else ({}, {})
    config: Any = getattr(bare, "config", None)
    dropout = dict(_dropout_fields(config.to_dict())) if hasattr(config, "to_dict") else None
    return RunRecord(name, history, patches, penalties, dropout, run.args.weight_decay)


def read_run(run: Any) -> RunRecord:
    """What is known of a run.

    Args:
        run (`str`, `Path`, [`~transformers.Trainer`], its `state` or `log_history`): see [`~hf_reg.diagnose`].

    Raises:
        `ValueError`: for what is there but cannot be read. `TypeError`: for something without logs.
    """
    if isinstance(run, (str, os.PathLike)):
        return _from_folder(Path(run).expanduser())
    state = getattr(run, "state", run)
    logs = getattr(state, "log_history", state)
    if not isinstance(logs, Iterable) or isinstance(logs, (bytes, Mapping)):
        raise TypeError(
            f"diagnose expects a Trainer, its state, its log_history or its output folder, got {type(run).__name__}."
        )
    return _from_trainer(run, list(logs))
