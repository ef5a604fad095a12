"""A Hub on loopback that huggingface_hub of this process talks to."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import close_session, constants, hf_api
from safetensors.torch import save_file

from . import loopback, stubs
from .server import HubServer


TOKEN = "hf_" + "AliceMayWrite" * 3
READER = "hf_" + "ReaderMayNot" * 3


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with loopback.only_loopback(), HubServer({TOKEN: "alice", READER: "reader"}, ("reader",)) as server:
        talk_to(server.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
    close_session()


def talk_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What huggingface_hub reads from the environment when it is imported."""
    for name, value in {
        "ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", url)  # whose methods are functions of the package
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # one that it keeps, of an earlier server
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(autouse=True)
def verification_and_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs.install(monkeypatch)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, which are not waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "checkpoint")


def checkpoint(path: Path, value: float = 0.0, shards: int = 1) -> Path:
    """What save_pretrained writes of a model in so many shards."""
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "bert"}')
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, name in enumerate(["model.safetensors"] if shards == 1 else names):
        save_file({f"weight{i}": torch.full((2, 2), value + i)}, path / name)
    if shards > 1:
        (path / "model.safetensors.index.json").write_text("{}")
    return path


def adapter(path: Path, base: str | None, **files: str) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 2}))
    save_file({"lora_A.weight": torch.ones(2, 2)}, path / "adapter_model.safetensors")
    for name, text in files.items():
        (path / name.replace("_json", ".json")).write_text(text)
    return path
