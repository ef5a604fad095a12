"""Files that are there whole or not at all, however many processes write them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from .messages import say


__all__ = ["finish_dead_saves", "is_staged", "replacing", "staging"]

WORK = re.compile(r"_saving-(.*)-(\d+)-(\d+)-[0-9a-f]{32}")  # node, process, and when that started
OLD, NEW, LIVE = "old", "new", "live"
LAST = ("config.json", "adapter_config.json")  # without which nothing loads a folder
LONG_AGO = 24 * 3600  # seconds without a change until a save on another machine counts as dead; our choice
SAME = 60  # seconds by which two looks at the start of one process may differ: clocks are set; our choice


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another path beside `path` to write to; it takes the place of `path` when the body is through, if it is."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def staging(folder: Path, outdated: Callable[[set[str]], Iterable[str]] = lambda written: ()) -> Iterator[Path]:
    """An empty folder inside `folder` to write to; when the body is through, all its files take their places at once.

    A rename changes one file, so the places become links first, each to what it held, by way of one further link,
    `live`. Turning `live` changes all files in one step; then they move to where the links are. Whenever the process
    is killed, a reader of `folder` finds every file as it was or every file as written, and the next save there moves
    what is left. Without links in the file system readers find no configuration, instead, while files move.

    Args:
        folder (`Path`): made if it is not there.
        outdated (`Callable`, *optional*): from the paths that were written to the files of `folder` that go with them.

    Raises:
        `ValueError`: if `folder` is a file.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: expected a folder to save into.")
    finish_dead_saves(folder)
    process = psutil.Process()
    work = folder / f"_saving-{platform.node()}-{process.pid}-{process.create_time():.0f}-{uuid.uuid4().hex}"
    try:
        (work / NEW).mkdir(parents=True)
        yield work / NEW
        written = _files(work / NEW)
        gone = {name for name in outdated(written) if (folder / name).is_file()} - written
        (work / OLD).mkdir()
        try:
            _keep(folder, work, written | gone)
        except OSError as error:
            say(f"{folder} has no links ({error}): a save killed while its files move is not loaded until the next.")
            _set_aside(folder, work, {name for name in written if Path(name).name in LAST}, gone)
        else:
            _turn(folder, work, written | gone)
    finally:
        _settle(folder, work)


def is_staged(folder: Path) -> bool:
    """Whether `folder` is, or is in, one that `staging` gave."""
    return any(WORK.fullmatch(path.name) for path in folder.absolute().parents)


def finish_dead_saves(folder: Path) -> None:
    """Put files in their places that a killed process was moving, and remove what it was still writing."""
    for work in folder.glob("_saving-*"):
        if _is_dead(work):
            _settle(folder, work)


def _is_dead(work: Path) -> bool:
    """Whether the process that made `work` has ended."""
    made = WORK.fullmatch(work.name)
    if made is None:
        return False
    if made[1] != platform.node():
        return time.time() - max(path.stat().st_mtime for path in (work, *work.rglob("*"))) > LONG_AGO
    try:
        process = psutil.Process(int(made[2]))
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - int(made[3])) > SAME
    except psutil.NoSuchProcess:
        return True


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _keep(folder: Path, work: Path, names: set[str]) -> None:
    """A second name in `work` for what stands in `folder`; `live` leads to it. `OSError` where there are no links."""
    (work / LIVE).symlink_to(OLD)
    for name in names:
        if (folder / name).is_file():
            (work / OLD / name).parent.mkdir(parents=True, exist_ok=True)
            (work / OLD / name).hardlink_to((folder / name).resolve())


def _turn(folder: Path, work: Path, names: set[str]) -> None:
    """Every place becomes a link to what it holds, then all hold the new files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "link").symlink_to(os.path.relpath(work / LIVE / name, (folder / name).parent))
        os.replace(work / "link", folder / name)
    (work / "link").symlink_to(NEW)
    os.replace(work / "link", work / LIVE)


def _set_aside(folder: Path, work: Path, first: set[str], gone: set[str]) -> None:
    """Without links: take away what makes `folder` a checkpoint, and what goes; from the last line on, go forward."""
    (work / LIVE).unlink(missing_ok=True)
    shutil.rmtree(work / OLD)
    for name in [*first, *gone]:
        if (folder / name).is_file():
            (work / OLD / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, work / OLD / name)
    os.rename(work / NEW, work / LIVE)


def _settle(folder: Path, work: Path) -> None:
    """The files that `live` leads to, or those that were kept, move to their places, and `work` goes."""
    source = work / (LIVE if (work / LIVE).is_dir() else OLD)
    for name in sorted(_files(source.resolve()), key=lambda name: (Path(name).name in LAST, name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, folder / name)
    for name in _files(work / OLD) | _files(work / NEW):
        if (folder / name).is_symlink() and not (folder / name).exists():
            (folder / name).unlink()
    shutil.rmtree(work / OLD, ignore_errors=True)  # first: without `live` it would be put back
    if not (work / OLD).exists():
        shutil.rmtree(work, ignore_errors=True)
