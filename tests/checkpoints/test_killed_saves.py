"""SIGKILL between any two file operations of a save: stock classes load the earlier checkpoint or the new one."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_reg import SorsaConfig, get_regularized_peft_model, patch_model
from hf_reg.checkpoints.writing import replacing_checkpoint
from hf_reg.files import finish_dead_saves, staging

from ..adapters.models import build, logits


OPERATIONS = ("os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir")
Write = Callable[..., None]


def shift(model: Any, by: float) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by)
    return model


def as_it_is(made: Any) -> Any:
    return made


def model(folder: Path, by: float, then: Callable[[Any], Any] = as_it_is, **settings: Any) -> None:
    made = then(shift(build(), by))
    made.config.rms_norm_eps = 1e-6 + 10 * by  # the old weights with the new configuration are something else
    made.save_pretrained(folder, **settings)


shards = partial(model, max_shard_size="20KB")


def lora(folder: Path, by: float, then: Callable[[Any], Any] = as_it_is) -> None:
    config = LoraConfig(r=2, lora_alpha=2 + round(100 * by), target_modules="all-linear", init_lora_weights=False)
    then(shift(get_peft_model(build(), config), by)).save_pretrained(folder)


def sorsa(folder: Path, by: float) -> None:
    config = SorsaConfig(r=2 + round(10 * by), task_type="CAUSAL_LM")
    shift(get_regularized_peft_model(build(), config), by).save_pretrained(folder)


CASES: dict[str, tuple[Write, Write]] = {
    "one file over one": (model, model),
    "shards over shards of the same names": (shards, shards),
    "shards over one file": (model, shards),
    "one file over shards": (shards, model),
    "an adapter over an adapter": (lora, lora),
    "an SVD adapter over another": (sorsa, sorsa),
    "a plain adapter over an SVD adapter": (sorsa, lora),
    "a model over an adapter": (lora, model),
}


def write(into: Path, kind: Write, by: float) -> None:
    kind(into, by)
    (into / "tokenizer.txt").write_text(str(by))


def seen(folder: Path) -> dict[str, bytes]:
    """The files as a reader finds them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def load(folder: Path) -> torch.Tensor:
    if (folder / "adapter_config.json").exists():
        return logits(PeftModel.from_pretrained(build(), str(folder)))
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def linked(folder: Path) -> bool:
    return any(path.is_symlink() for path in folder.iterdir())


def killed(save: Callable[[], None], before: int, writes: bool = False) -> bool:
    """Run `save` in a child that dies before its operation of this number, `writes` to files counted or not; whether
    it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, details: Any) -> None:
            nonlocal count
            if event in OPERATIONS or (writes and event == "open" and "w" in str(details[1])):
                count += 1
                if count > before:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            save()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def over(folder: Path, source: Path) -> None:
    with replacing_checkpoint(folder) as unfinished:
        shutil.copytree(source, unfinished, dirs_exist_ok=True)


@pytest.fixture
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    for name, kind, by in zip(("old", "new"), CASES[request.param], (0.0, 0.1), strict=True):
        write(tmp_path / name, kind, by)
    return tmp_path / "old", tmp_path / "new"


@pytest.mark.parametrize("prepared", CASES, indirect=True)
def test_a_reader_finds_the_old_or_the_new(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = prepared
    done, folder = tmp_path / "done", tmp_path / "folder"
    shutil.copytree(source, done)
    over(done, target)
    states = {"old": seen(source), "new": seen(done)}
    wanted = {"old": load(source), "new": load(target)}
    assert not torch.allclose(wanted["old"], wanted["new"])
    found: list[str] = []
    loaded: set[tuple[str, bool]] = set()
    for moment in range(1000):
        shutil.copytree(source, folder)
        dies = killed(partial(over, folder, target), moment)
        state = next((name for name, files in states.items() if files == seen(folder)), "a mixture")
        assert state in wanted, f"killed before operation {moment}: {sorted(seen(folder))}"
        if (state, linked(folder)) not in loaded:
            loaded.add((state, linked(folder)))
            assert torch.equal(load(folder), wanted[state])
        finish_dead_saves(folder)
        assert seen(folder) == states[state] and not linked(folder) and not list(folder.glob("_saving-*"))
        shutil.rmtree(folder)
        found.append(state)
        if not dies:
            break
    assert found == sorted(found, reverse=True) and found.count("old") > 5 and found.count("new") > 5
    assert len(loaded) == 4  # each with and without links


def refuse_links(*_: Any) -> None:
    raise OSError("no links on this file system")


@pytest.mark.parametrize("prepared", ["one file over shards", "a plain adapter over an SVD adapter"], indirect=True)
def test_without_links_a_reader_finds_no_mixture(
    prepared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = prepared
    monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING, "transformers")
    done, folder = tmp_path / "done", tmp_path / "folder"
    shutil.copytree(source, done)
    over(done, target)
    assert "no links on this file system" in caplog.text
    states = [seen(source), seen(done)]
    assert torch.equal(load(done), load(target)) and not list(done.glob("_saving-*"))
    refused = after = 0
    for moment in range(1000):
        shutil.copytree(source, folder)
        dies = killed(partial(over, folder, target), moment)
        if seen(folder) not in states:
            refused += 1
            assert not {"config.json", "adapter_config.json"} & seen(folder).keys()
        finish_dead_saves(folder)
        assert seen(folder) in states[after:] and not list(folder.glob("_saving-*"))
        after = max(after, states.index(seen(folder)))
        shutil.rmtree(folder)
        if not dies:
            break
    assert refused > 3 and after == 1
    shutil.copytree(source, folder)
    for name in ("config.json", "adapter_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="adapter_config.json"):
        PeftModel.from_pretrained(build(), str(folder))


@pytest.mark.parametrize("prepared", ["one file over shards"], indirect=True)
def test_finishing_may_be_killed_too(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = prepared
    folder, again = tmp_path / "folder", tmp_path / "again"
    shutil.copytree(source, folder)
    moment = 30
    while not (killed(partial(over, folder, target), moment) and seen(folder).get("tokenizer.txt") == b"0.1"):
        moment += 1
        shutil.rmtree(folder)
        shutil.copytree(source, folder)
    assert linked(folder)
    states = seen(folder)
    for moment in range(1000):
        shutil.copytree(folder, again, symlinks=True)
        dies = killed(partial(finish_dead_saves, again), moment)
        assert seen(again) == states, moment
        shutil.rmtree(again)
        if not dies:
            break
    assert moment > 5


def test_saves_of_svd_adapters_are_whole_without_a_trainer(tmp_path: Path) -> None:
    sorsa(tmp_path / "folder", 0.0)
    shutil.copytree(tmp_path / "folder", tmp_path / "done")
    sorsa(tmp_path / "done", 0.1)
    states, found = [seen(tmp_path / name) for name in ("folder", "done")], []
    for moment in (*range(0, 100, 6), 1000):
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "folder", folder)
        killed(partial(sorsa, folder, 0.1), moment)
        found.append(states.index(seen(folder)))
    assert found == sorted(found) and found[0] == 0 and found[-1] == 1
    with pytest.raises(ValueError, match="is a file: expected a folder"):
        sorsa(tmp_path / "done" / "hf_reg.json", 0.1)


@pytest.mark.parametrize("kind", [model, shards, lora])
def test_save_pretrained_of_a_patched_model_is_whole(kind: Write, tmp_path: Path) -> None:
    source, done, folder = tmp_path / "source", tmp_path / "done", tmp_path / "folder"
    patch = partial(patch_model, patch="drophead")
    kind(source, 0.0, then=patch)
    shutil.copytree(source, done)
    kind(done, 0.1, then=patch)
    assert not list(done.glob("_saving-*"))
    states, found = [seen(source), seen(done)], []
    for moment in range(1000):
        shutil.copytree(source, folder)
        dies = killed(partial(kind, folder, 0.1, then=patch), moment, writes=True)
        assert seen(folder) in states, f"killed before operation {moment}: {sorted(seen(folder))}"
        found.append(states.index(seen(folder)))
        shutil.rmtree(folder)
        if not dies:
            break
    assert found == sorted(found) and found.count(0) > 5 and found.count(1) > 5


def test_only_what_dead_saves_left_goes(tmp_path: Path) -> None:
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with staging(tmp_path) as unfinished:
            (unfinished / "a").write_text("unfinished")
            os.write(ready[1], b".")
            os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    node, far = platform.node(), "_saving-elsewhere-{}-1-" + "0" * 32
    start = round(psutil.Process().create_time())
    for name in (
        far.format(1),
        far.format(2),
        f"_saving-{node}-{os.getpid()}-{start - 1000}-" + "0" * 32,
        "_saving-x",
    ):
        (tmp_path / name / "new").mkdir(parents=True)
    long_ago = time.time() - 3 * 24 * 3600
    for path in (tmp_path / far.format(2), tmp_path / far.format(2) / "new"):
        os.utime(path, (long_ago, long_ago))
    with staging(tmp_path) as mine:
        left = sorted(path.name for path in tmp_path.iterdir())
        with staging(tmp_path):
            assert mine.is_dir()  # of this process, which lives
    living = [name for name in left if name.startswith(f"_saving-{node}-{child}-")]
    assert left == sorted([far.format(1), "_saving-x", mine.parent.name, *living]) and len(living) == 1
    os.kill(child, signal.SIGKILL)
    while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    finish_dead_saves(tmp_path)  # a zombie writes nothing more
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([far.format(1), "_saving-x"])
    os.waitpid(child, 0)
