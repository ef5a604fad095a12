"""A Hub that is busy, full, closed or gone: tried again, or explained; and never half a revision."""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hf_reg import push_to_hub
from hf_reg.hub import PushError, repository

from . import loopback
from .conftest import READER, TOKEN, checkpoint, talk_to
from .server import HubServer
from .test_push import REPO


COMMIT, LARGE = "/commit/", "/large/"


@pytest.fixture
def pushed(hub: HubServer, tmp_path: Path) -> str:
    """The commit of a first push."""
    return push_to_hub(checkpoint(tmp_path / "first", 9.0), REPO).oid


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/preupload/", 401, ["401", "hf auth login", "token="]),
        ("POST", COMMIT, 403, ["403", "may not write", "namespace"]),
        ("POST", COMMIT, 404, ["404", "repo_id, revision and token"]),
        ("POST", COMMIT, 409, ["409", "at this moment"]),
        ("POST", COMMIT, 412, ["412", "another commit arrived"]),
        ("PUT", LARGE, 413, ["413", "max_shard_size"]),
        ("POST", COMMIT, 429, ["429", "too many requests"]),
        ("POST", COMMIT, 500, ["500", "status.huggingface.co"]),
        ("PUT", LARGE, 503, ["503", "status.huggingface.co"]),
        ("GET", "/api/models/", 502, ["502", "status.huggingface.co"]),
        ("POST", COMMIT, 418, ["418", "injected"]),
        ("POST", COMMIT, "drop", ["no connection", "HF_ENDPOINT"]),
        ("PUT", LARGE, "drop", ["no connection", "HF_ENDPOINT"]),
    ],
)
def test_said_and_nothing_changed(
    hub: HubServer, pushed: str, folder: Path, pauses: list[float], caplog: Any,
    method: str, path: str, status: int | str, words: list[str],
) -> None:  # fmt: skip
    hub.fail(method, path, status, times=1000)
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING, "transformers")
    with caplog.at_level(logging.DEBUG), pytest.raises(PushError) as error:
        push_to_hub(folder, REPO)
    text = str(error.value)
    assert all(word in text for word in [*words, REPO, hub.url, "complete revision"]), text
    assert error.value.status == (status if isinstance(status, int) else None)
    assert error.value.__cause__ is not None
    assert hub.repositories[REPO].branches == {"main": pushed}
    assert TOKEN not in text + repr(error.value.__cause__) + caplog.text
    transient = status == "drop" or status in repository.TRANSIENT
    assert bool(pauses) == transient
    assert caplog.text.count("Trying again") == (4 if transient and path != LARGE else 0)


@pytest.mark.parametrize(("path", "status"), [(COMMIT, 403), (LARGE, 400)])
def test_a_full_account(hub: HubServer, folder: Path, path: str, status: int) -> None:
    hub.fail("PUT" if path == LARGE else "POST", path, status, message="Private repository storage limit reached")
    with pytest.raises(PushError, match="ask for more storage"):
        push_to_hub(folder, REPO)


def test_tokens(hub: HubServer, folder: Path) -> None:
    wrong = "hf_" + "Nobody" * 6
    for token, repo, status in ((wrong, REPO, 401), (wrong, "model", 401), (False, REPO, 401), (READER, REPO, 403)):
        with pytest.raises(PushError) as error:
            push_to_hub(folder, repo, token=token)
        assert error.value.status == status and str(token) not in str(error.value).replace("False", "")
    with pytest.raises(PushError, match="may not write"):
        push_to_hub(folder, "bob/model")
    assert not hub.repositories


def test_without_a_token(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for repo in (REPO, "model"):
        with pytest.raises(PushError, match="hf auth login") as error:
            push_to_hub(folder, repo)
        assert error.value.status == 401


def test_no_network(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    talk_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(PushError, match=r"no connection to http://127.0.0.1:9 .*refused.*proxy"):
        push_to_hub(folder, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(folder, REPO)


def test_a_card_that_the_hub_refuses(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model: /home/alice/base\n---\n")
    with pytest.raises(PushError, match=r"(?s)refused the model card.*base_model"):
        push_to_hub(folder, REPO)
    assert not hub.counted("PUT", LARGE)


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("POST", COMMIT, 503), ("POST", COMMIT, 429), ("POST", COMMIT, "drop"), ("POST", COMMIT, "lose"),
        ("GET", "/api/models/", 500), ("POST", "/repos/create", "drop"), ("POST", "/repos/create", "lose"),
        ("POST", "/branch/", 504), ("POST", "/branch/", "lose"), ("POST", "/validate-yaml", 503),
        ("POST", "/preupload/", 429), ("PUT", LARGE, 503), ("PUT", LARGE, "drop"), ("PUT", LARGE, "lose"),
    ],
)  # fmt: skip
def test_tried_again(
    hub: HubServer, folder: Path, pauses: list[float], method: str, path: str, what: int | str
) -> None:
    hub.fail(method, path, what, times=2)
    info = push_to_hub(folder, REPO, revision="next")
    made = hub.repositories[REPO]
    assert made.branches["next"] == info.oid and len(made.commits) == 2  # the first, and this one: once
    assert hub.files(REPO, "next")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(pauses) in (1, 2) and pauses == sorted(pauses)


def test_the_pauses_grow_and_obey(hub: HubServer, pushed: str, folder: Path, pauses: list[float]) -> None:
    hub.fail("POST", COMMIT, 503, times=3)
    push_to_hub(folder, REPO)
    assert pauses == [1, 2, 4]
    pauses.clear()
    (folder / "more.txt").write_text("more")
    hub.fail("POST", COMMIT, 429, retry_after=20)
    push_to_hub(folder, REPO)
    assert pauses == [20]
    (folder / "more.txt").write_text("yet more")
    hub.fail("POST", COMMIT, 429, retry_after=3600)
    with pytest.raises(PushError, match="too many requests"):
        push_to_hub(folder, REPO)
    assert pauses == [20]


def test_a_repeated_push_sends_what_is_missing(hub: HubServer, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "shards", shards=6)
    hub.fail("PUT", LARGE, 400, times=100, skip=2)
    with pytest.raises(PushError, match="400"):
        push_to_hub(folder, REPO)
    assert len(hub.large) == 2 and not hub.counted("POST", COMMIT)
    assert set(hub.files(REPO)) == {".gitattributes"}
    hub.faults.clear()
    hub.requests.clear()
    push_to_hub(folder, REPO)
    assert hub.counted("PUT", LARGE) == 4 and hub.counted("POST", COMMIT) == 1
    hub.requests.clear()
    push_to_hub(folder, "alice/other")
    assert hub.counted("PUT", LARGE) == 0


def test_another_push_at_the_same_time(hub: HubServer, pushed: str, folder: Path, tmp_path: Path) -> None:
    held = hub.fail("PUT", LARGE, "hold")
    failures: list[Exception] = []

    def slow() -> None:
        try:
            push_to_hub(folder, REPO)
        except PushError as error:
            failures.append(error)

    pusher = threading.Thread(target=slow)
    pusher.start()
    assert held.reached.wait(30)
    quick = push_to_hub(checkpoint(tmp_path / "quick", 3.0), REPO)
    held.release.set()
    pusher.join(30)
    assert [error.status for error in failures] == [412]  # type: ignore[attr-defined]
    assert "another commit arrived" in str(failures[0])
    assert hub.repositories[REPO].branches == {"main": quick.oid}


def test_the_token_is_nowhere(hub: HubServer, folder: Path, caplog: Any, capfd: Any, tmp_path: Path) -> None:
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.DEBUG):
        push_to_hub(folder, REPO, token=TOKEN, revision="next")
    written = capfd.readouterr()
    assert TOKEN not in caplog.text + written.out + written.err
    for request in hub.requests:
        assert TOKEN.encode() not in request.path.encode() + request.body
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_the_guard_guards(hub: HubServer) -> None:
    with pytest.raises(AssertionError, match="not on this machine"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    loopback.contacted.discard("192.0.2.1")
