"""What test_end_to_end.py starts: processes that read the environment as a user's do, and stay on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import loopback


def push(folder: str, repo: str) -> None:
    from hf_reg import push_to_hub

    push_to_hub(folder, repo)


def read(target: str, *wanted: str) -> None:
    """Load `kind:repo`, with stock classes, and leave the logits and what was imported in `target`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    logits: dict[str, Any] = {}
    for one in wanted:
        kind, repo = one.split(":")
        if kind == "model":
            model = AutoModelForSequenceClassification.from_pretrained(repo)
        else:
            base, repo = repo.split("+")
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repo)
        ids = torch.arange(1, 8)[None]
        if kind == "preferences":
            ids = AutoTokenizer.from_pretrained(repo)("what is it", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits[one] = model.eval()(input_ids=ids).logits
    assert not any(name == "hf_reg" or name.startswith("hf_reg.") for name in sys.modules)
    torch.save(logits, target)


def together(target: str, folder: str, missing: str) -> None:
    """Several processes push a trainer and more; each notes what it got: a result, ValueErrors and a PushError."""
    from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, push_to_hub
    from hf_reg.hub import PushError

    from ..adapters.models import build

    arguments = RegularizedTrainingArguments(f"{target}/run", use_cpu=True, report_to="none")
    rank = torch.distributed.get_rank()
    info = push_to_hub(RegularizedTrainer(model=build("bert"), args=arguments), "alice/together")
    got: list[Any] = [info.oid, info.commit_url]
    alone = folder if rank == 0 else missing  # which the second process alone cannot find
    for source, repo in ((missing, "alice/other"), (folder, "bob/not-mine"), (alone, "alice/other")):
        try:
            push_to_hub(source, repo)
        except (PushError, ValueError) as error:
            got.append((type(error).__name__, str(error), getattr(error, "status", None)))
    torch.save(got, Path(target) / f"{rank}.pt")


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what != "read":
        from . import stubs

        stubs.install(pytest.MonkeyPatch())
    with loopback.only_loopback():
        {"push": push, "read": read, "together": together}[what](*arguments)
    assert loopback.contacted <= set(loopback.LOCAL)
