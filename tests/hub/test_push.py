"""Folders: what is sent, in one commit, and what is refused before anything is."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import hf_reg
from hf_reg import push_to_hub
from hf_reg.files import staging
from hf_reg.hub import push

from ..checkpoints.test_killed_saves import killed, over
from . import stubs
from .conftest import READER, TOKEN, adapter, checkpoint
from .server import HubServer


REPO = "alice/model"
VERIFY, MAKE_CARD = push.verify, push.make_card  # which the other tests do without


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def writes(hub: HubServer) -> int:
    """Requests that could change something."""
    return hub.counted("POST", "/(create|commit|branch)") + hub.counted("PUT", "")


def test_one_commit(hub: HubServer, folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "drift.png").write_bytes(b"png")
    before = contents(folder)
    info = push_to_hub(folder, REPO, commit_message="First")
    assert info.commit_url.startswith(f"{hub.url}/{REPO}/commit/") and info.commit_message == "First"
    assert hub.counted("POST", "/commit/") == 1
    sent = hub.files(REPO)
    assert {name: sent[name] for name in before} == before
    assert set(sent) == {*before, "README.md", ".gitattributes"} and b"# Card" in sent["README.md"]
    assert contents(folder) == before  # no card in it, and nothing else new
    assert not hub.repositories[REPO].private
    again = push_to_hub(str(folder), "model", commit_message="Second")  # of the token's own user
    assert again.oid == info.oid and hub.counted("POST", "/commit/") == 1


def test_new_weights_replace_all_of_the_old(hub: HubServer, tmp_path: Path) -> None:
    push_to_hub(checkpoint(tmp_path / "shards", shards=3), REPO)
    assert sum(name.startswith("model") for name in hub.files(REPO)) == 4
    push_to_hub(checkpoint(tmp_path / "whole"), REPO)
    assert [name for name in hub.files(REPO) if name.startswith("model")] == ["model.safetensors"]
    push_to_hub(adapter(tmp_path / "sorsa", "alice/base", hf_reg_json="{}"), "alice/adapter")
    push_to_hub(adapter(tmp_path / "lora", "alice/base"), "alice/adapter")
    assert "hf_reg.json" not in hub.files("alice/adapter")
    assert "README.md" in hub.files("alice/adapter")


REFUSED = ["pytorch_model.bin", "modeling_own.py", "weights.pkl", "train.sh", "a/b/model.pt", "data.csv", "link.json"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(hub: HubServer, folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name == "link.json":
        (folder.parent / "outside.json").write_text("{}")
        (folder / name).symlink_to(folder.parent / "outside.json")
    else:
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match=name):
        push_to_hub(folder, REPO)
    assert not hub.requests


def test_a_linked_folder_is_refused(hub: HubServer, folder: Path) -> None:
    (folder / "more").symlink_to(checkpoint(folder.parent / "elsewhere"))
    with pytest.raises(ValueError, match=r"more \(a link\)"):
        push_to_hub(folder, REPO)


def test_a_run_keeps_its_state(hub: HubServer, folder: Path, caplog: Any) -> None:
    state = ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json"]
    state += ["hf_reg_penalties.safetensors"]
    for name in state:
        (folder / name).write_text(f"secret {TOKEN}")
    checkpoint(folder / "checkpoint-10")
    checkpoint(folder / ".cache")
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, "transformers"):
        push_to_hub(folder, REPO)
    assert set(hub.files(REPO)) == {"config.json", "model.safetensors", "README.md", ".gitattributes"}
    said = next(text for text in caplog.messages if text.startswith("Not pushed"))
    assert all(name in said for name in [*state, "checkpoint-10", ".cache"])


def test_no_checkpoint(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint"):
        push_to_hub(folder, REPO)
    with pytest.raises(ValueError, match="no folder"):
        push_to_hub(tmp_path / "nothing", REPO)
    with pytest.raises(TypeError, match="int"):
        push_to_hub(3, REPO)
    with pytest.raises(ValueError, match="tokenizer"):
        push_to_hub(folder, REPO, tokenizer=object())
    with pytest.raises(ValueError, match="Repo id"):
        push_to_hub(folder, "not a name")
    assert not hub.requests


def test_a_failed_verification(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def verify_checkpoint(path: Path, *, model: Any = None) -> SimpleNamespace:
        seen.append((sorted(contents(path)), model))
        return SimpleNamespace(passed=False, problems=["weight0 is missing", "logits differ by 3"])

    monkeypatch.setattr(push, "verify", VERIFY)
    monkeypatch.setattr(hf_reg, "verify_checkpoint", verify_checkpoint, raising=False)
    (folder / "training_args.bin").write_bytes(b"a pickle that is not sent")
    with pytest.raises(ValueError, match="weight0 is missing; logits differ by 3"):
        push_to_hub(folder, REPO)
    assert seen == [(["config.json", "model.safetensors"], None)]
    assert not hub.requests


def test_a_card_with_all_that_belongs_to_it(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[str] = []
    cards = ModuleType("hf_reg.cards")

    def write_card(folder: Path, source: Any = None, **facts: Any) -> Path:
        assert facts == {"repo_id": REPO}
        (folder / "learning_curve.png").write_bytes(b"png")
        stubs.make_card(folder, source)
        return folder / "README.md"

    vars(cards).update(write_card=write_card, check_metadata=lambda text: problems)
    monkeypatch.setitem(sys.modules, "hf_reg.cards", cards)
    monkeypatch.setattr(push, "make_card", MAKE_CARD)
    problems.append("license: 3 is no licence")
    with pytest.raises(ValueError, match="license: 3"):
        push_to_hub(folder, REPO)
    assert not writes(hub)
    problems.clear()
    push_to_hub(folder, REPO)
    assert {"README.md", "learning_curve.png"} <= set(hub.files(REPO))


def test_what_others_wrote_in_the_card_is_kept(hub: HubServer, folder: Path) -> None:
    push_to_hub(folder, REPO)
    repository = hub.repositories[REPO]
    edited = {**hub.files(REPO), "README.md": b"---\nlicense: mit\n---\nEdited on the Hub.\n"}
    repository.commit("main", edited)
    push_to_hub(folder, REPO, revision="next")
    assert b"Edited on the Hub." in hub.files(REPO, "next")["README.md"]
    assert b"# Card" in hub.files(REPO, "next")["README.md"]
    (folder / "README.md").write_text("The folder's own.\n")
    push_to_hub(folder, REPO)
    assert hub.files(REPO)["README.md"].startswith(b"The folder's own.")


def test_a_revision_is_a_branch(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    first = push_to_hub(folder, REPO)
    second = push_to_hub(checkpoint(tmp_path / "other", 5.0), REPO, revision="runs/5")
    branches = hub.repositories[REPO].branches
    assert branches == {"main": first.oid, "runs/5": second.oid}
    assert hub.files(REPO)["model.safetensors"] != hub.files(REPO, "runs/5")["model.safetensors"]


def test_private(hub: HubServer, folder: Path) -> None:
    push_to_hub(folder, REPO, private=True)
    assert hub.repositories[REPO].private
    push_to_hub(folder, REPO)  # as it is
    push_to_hub(folder, "alice/open")
    before = writes(hub)
    with pytest.raises(ValueError, match="is public, but private=True"):
        push_to_hub(folder, "alice/open", private=True)
    assert writes(hub) == before


def test_a_model_and_an_adapter_are_not_mixed(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    push_to_hub(folder, REPO)
    before = writes(hub)
    with pytest.raises(ValueError, match="readers would mix"):
        push_to_hub(adapter(tmp_path / "adapter", "alice/base"), REPO)
    assert writes(hub) == before


@pytest.mark.parametrize("base", [None, "", "/home/alice/base", "./base", "base"])
def test_a_base_of_this_machine(
    hub: HubServer, tmp_path: Path, base: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()  # which could be a name of the Hub too
    folder = adapter(tmp_path / "adapter", base)
    before = contents(folder)
    with pytest.raises(ValueError, match="base_model="):
        push_to_hub(folder, REPO)
    assert not hub.requests
    push_to_hub(folder, REPO, base_model="alice/base")
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] == "alice/base"
    assert contents(folder) == before
    assert stubs.calls[-1][0] == "card" and stubs.calls[-1][3] == {"repo_id": REPO, "base_model": "alice/base"}


@pytest.mark.parametrize(("base", "verified"), [("", "alice/base"), ("/somewhere", "/somewhere")])
def test_the_base_that_is_verified_on(
    hub: HubServer, tmp_path: Path, base: str, verified: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def verify(folder: Path, model: Any) -> None:
        files = contents(folder)
        seen.append(("README.md" in files, json.loads(files["adapter_config.json"])["base_model_name_or_path"]))

    monkeypatch.setattr(push, "verify", verify)
    folder = adapter(tmp_path / "adapter", base)
    (folder / "README.md").write_text("---\nbase_model: ''\n---\nOf PEFT.\n")
    push_to_hub(folder, REPO, base_model="alice/base")
    assert seen == [(False, verified)] and b"Of PEFT." in hub.files(REPO)["README.md"]
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] == "alice/base"


def test_a_base_of_the_hub_stays(hub: HubServer, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", "alice/base")
    push_to_hub(folder, REPO)
    assert hub.files(REPO)["adapter_config.json"] == (folder / "adapter_config.json").read_bytes()


def test_saves_that_are_dead_or_going_on(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """What a killed save left is put right first; what another is writing is not sent."""
    new = contents(checkpoint(tmp_path / "new", 5.0, shards=2))
    moment = 0
    while not any(path.is_symlink() for path in folder.iterdir()):
        assert killed(lambda: over(folder, tmp_path / "new"), moment)
        moment += 1
    old = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with staging(folder) as unfinished:  # finishes the dead one, too
        (unfinished / "model.safetensors").write_bytes(b"half")
        push_to_hub(folder, REPO)
        found = {name: data for name, data in hub.files(REPO).items() if name in old.keys() | new.keys()}
        assert found == old and not any("_saving" in name for name in hub.files(REPO))
    shutil.rmtree(folder)
    moment += 1
    while True:
        checkpoint(folder)
        assert killed(lambda: over(folder, tmp_path / "new"), moment)
        if contents(folder).keys() >= new.keys() and any(path.is_symlink() for path in folder.iterdir()):
            break
        shutil.rmtree(folder)
        moment += 1
    push_to_hub(folder, "alice/new")
    assert new.items() <= hub.files("alice/new").items() and "model.safetensors" not in hub.files("alice/new")
    assert contents(folder) == new


@pytest.mark.parametrize("secret", [TOKEN, READER])
def test_a_token_in_a_file(hub: HubServer, folder: Path, secret: str) -> None:
    (folder / "settings.json").write_text(json.dumps({"hub_token": secret}))
    with pytest.raises(ValueError, match=r"settings.json holds an access token") as error:
        push_to_hub(folder, REPO)
    assert secret not in str(error.value) and not writes(hub)


def test_public_name() -> None:
    assert hf_reg.push_to_hub is push.push_to_hub and "push_to_hub" in hf_reg.__all__
