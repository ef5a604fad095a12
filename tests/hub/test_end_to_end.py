"""From a trained model to the Hub and back: other processes, stock classes, an empty cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, patch_model, push_to_hub

from ..adapters import models
from ..distributed.launch import ROOT, environment, launch, run
from ..preferences.models import llama, trainer
from ..preferences.words import tokenizer
from . import loopback, stubs
from .conftest import TOKEN
from .server import HubServer


def read(hub: HubServer, folder: Path, *wanted: str) -> dict[str, torch.Tensor]:
    """The logits of what another process loads, `kind:repo`."""
    folder.mkdir()
    target = str(folder / "logits.pt")
    done = run(["tests.hub.process", "read", target, *wanted], **hub.environment(folder / "home", TOKEN))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(target)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_there_and_back(hub: HubServer, tmp_path: Path) -> None:
    expected = {}
    some = torch.arange(1, 8)[None]

    bert = patch_model(models.build("bert"), "tlm")
    arguments = RegularizedTrainingArguments(
        str(tmp_path / "run"), hub_token=TOKEN, push_to_hub=True, hub_model_id="alice/by-itself", use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    classifier = RegularizedTrainer(model=bert, args=arguments, processing_class=tokenizer())
    push_to_hub(classifier, "alice/bert", base_model="alice/pretrained")
    expected["model:alice/bert"] = logits(bert, some)
    assert "alice/by-itself" not in {name for name, made in hub.repositories.items() if len(made.commits) > 1}
    assert stubs.calls[-2][2] is bert and stubs.calls[-1][2] is classifier

    push_to_hub(models.build(), "alice/base")
    sorsa = models.train(models.adapted("sorsa"))
    config = sorsa.peft_config["default"]
    before = config.base_model_name_or_path
    push_to_hub(sorsa, "alice/sorsa", base_model="alice/base")
    assert sorsa.peft_config["default"] is config and config.base_model_name_or_path == before
    assert b"alice/base" in hub.files("alice/sorsa")["adapter_config.json"]
    assert "hf_reg.safetensors" in hub.files("alice/sorsa")
    assert hub.files("alice/sorsa")["README.md"] == hub.files("alice/bert")["README.md"]  # ours, nothing of PEFT's
    expected["adapter:alice/base+alice/sorsa"] = logits(sorsa, some)
    plain = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    adapters = {"ba_lora": models.adapted("ba_lora"), "lora": get_peft_model(models.build(), plain)}
    for name, adapted in adapters.items():
        push_to_hub(adapted, f"alice/{name}", base_model="alice/base")
        expected[f"adapter:alice/base+alice/{name}"] = logits(adapted, some)
    assert "hf_reg.safetensors" not in hub.files("alice/lora")

    made = trainer(tmp_path / "rpo", max_steps=2)
    made.train()
    push_to_hub(llama(), "alice/policy-base")
    own = made.model.peft_config["default"]
    own.base_model_name_or_path, made.model.get_base_model().name_or_path = None, str(tmp_path / "base")
    push_to_hub(made, "alice/rpo", base_model="alice/policy-base")
    assert own.base_model_name_or_path is None  # which PEFT fills in when it saves
    ids = tokenizer()("what is it", return_tensors="pt")["input_ids"]
    expected["preferences:alice/policy-base+alice/rpo"] = logits(made.model, ids)

    for repo in ("alice/bert", "alice/rpo"):
        assert {"tokenizer.json", "chat_template.jinja"} <= set(hub.files(repo))
        assert not any(name.endswith((".bin", ".pt", ".pth")) for name in hub.files(repo))
    for request in hub.requests:
        assert TOKEN.encode() not in request.path.encode() + request.body
    found = read(hub, tmp_path / "reader", *expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert loopback.contacted <= set(loopback.LOCAL)


def test_a_push_that_is_killed(hub: HubServer, tmp_path: Path) -> None:
    old, new = models.build("bert"), models.build("bert")
    push_to_hub(old, "alice/bert")
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(0.1)
    new.save_pretrained(tmp_path / "new", max_shard_size="20KB")
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 2
    before = dict(hub.repositories["alice/bert"].branches)
    held = hub.fail("PUT", "/large/", "hold", skip=1)
    settings = environment(**hub.environment(tmp_path / "home", TOKEN))
    command = [sys.executable, "-m", "tests.hub.process", "push", str(tmp_path / "new"), "alice/bert"]
    pusher = subprocess.Popen(command, env=settings, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        assert held.reached.wait(120)
    finally:
        os.kill(pusher.pid, signal.SIGKILL)
        pusher.communicate()
    held.release.set()
    assert hub.counted("PUT", "/large/") >= 3 and hub.repositories["alice/bert"].branches == before
    found = read(hub, tmp_path / "reader", "model:alice/bert")
    ids = torch.arange(1, 8)[None]
    torch.testing.assert_close(found["model:alice/bert"], logits(old, ids), rtol=1e-5, atol=1e-5)
    arrived = len(hub.large)
    hub.requests.clear()
    push_to_hub(tmp_path / "new", "alice/bert")
    assert hub.counted("PUT", "/large/") == len(hub.large) - arrived  # what the dead one sent is not sent again
    assert hub.repositories["alice/bert"].branches != before


@pytest.mark.distributed
def test_two_processes_push_once(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    arguments = ["together", str(tmp_path), str(folder), str(tmp_path / "nothing")]
    launch("tests.hub.process", *arguments, **hub.environment(tmp_path / "home", TOKEN))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    oid, url, missing, forbidden, alone = first
    assert hub.repositories["alice/together"].branches["main"] == oid and url.endswith(oid)
    for refused in (missing, alone):
        assert refused[0] == "ValueError" and "no folder" in refused[1]
    assert forbidden[0] == "PushError" and forbidden[2] == 403
    assert len(hub.files("alice/together")["model.safetensors"]) > 100_000
    assert hub.counted("POST", "/commit/") == 1 and hub.counted("POST", "/repos/create") == 2


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_sharded_processes_save_resume_and_push_the_whole(hub: HubServer, tmp_path: Path, kind: str) -> None:
    if kind == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")
    push_to_hub(models.build(), "alice/base")
    hub.requests.clear()
    launch("tests.hub.sharded", kind, str(tmp_path), **hub.environment(tmp_path / "home", TOKEN))
    (got, failures), (other, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert got == other and hub.counted("POST", "/commit/") == 3  # once each
    assert "alice/none" not in hub.repositories
    wrong_token, full_disk, push_of_parts, save_of_parts = failures
    assert others[0] == wrong_token and wrong_token[0] == "PushError" and "401" in wrong_token[1]
    assert "File too large" in full_disk[1] and others[1][0] == "RuntimeError" and full_disk[1] in others[1][1]
    assert push_of_parts[0] == others[2][0] == "ValueError"  # nothing that could be pushed
    assert save_of_parts == others[3] and save_of_parts[0] == "ValueError" and "FULL_STATE_DICT" in save_of_parts[1]
    some, wanted = torch.arange(1, 8)[None], {}
    for name, oid in got.items():
        assert hub.repositories[f"alice/{name}"].branches["main"] == oid
        assert not any(path.endswith((".bin", ".pt", ".pth")) for path in hub.files(f"alice/{name}"))
        final, resumed = (tmp_path / name / which for which in ("final", "resumed"))
        for path in final.glob("*.safetensors"):
            torch.testing.assert_close(load_file(path), load_file(resumed / path.name))
            assert hub.files(f"alice/{name}")[path.name] == path.read_bytes()
        if name == "bert":
            wanted["model:alice/bert"] = logits(type(models.build("bert")).from_pretrained(final), some)
            assert not torch.allclose(wanted["model:alice/bert"], logits(models.build("bert"), some))
        else:
            made = PeftModel.from_pretrained(models.build(), str(final))
            wanted[f"adapter:alice/base+alice/{name}"] = logits(made, some)
    found = read(hub, tmp_path / "reader", *wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
