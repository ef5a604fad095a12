"""`hf-reg verify` and `hf-reg push`, and a push with the real verification and the real card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from hf_reg import load_regularized, patch_model
from hf_reg.cli import app

from ..adapters import models
from .server import HubServer


@pytest.fixture
def verification_and_cards() -> None:
    """The real ones, here."""


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    patch_model(models.build("bert"), "tlm", rate=0.2).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_verify(bert: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(bert), "--json"])
    found = json.loads(done.output)
    assert done.exit_code == 0 and found["passed"] and found["largest_logit_difference"] < 1e-5
    (bert / "pytorch_model.bin").write_bytes(b"x")
    done = CliRunner().invoke(app, ["verify", str(bert)])
    assert done.exit_code == 1 and "pytorch_model.bin" in done.output
    done = CliRunner().invoke(app, ["verify", str(bert / "nothing")])
    assert done.exit_code == 2 and "there is no folder" in done.stderr


def test_push(hub: HubServer, bert: Path) -> None:
    done = CliRunner().invoke(app, ["push", str(bert), "alice/bert-tlm", "--base-model", "alice/pretrained"])
    assert done.exit_code == 0 and "alice/bert-tlm" in done.output, done.output
    card = Path(hf_hub_download("alice/bert-tlm", "README.md")).read_text()
    assert "base_model: alice/pretrained" in card and "2310.18738" in card and "no baseline" in card.lower()
    ids = torch.arange(1, 9)[None]
    stock = AutoModelForSequenceClassification.from_pretrained("alice/bert-tlm").eval()
    again = load_regularized(str(bert)).eval()
    torch.testing.assert_close(stock(ids).logits, again(ids).logits)


def test_what_fails_verification_is_not_pushed(hub: HubServer, bert: Path) -> None:
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    done = CliRunner().invoke(app, ["push", str(bert), "alice/broken"])
    assert done.exit_code == 1 and "alice/broken" not in hub.repositories
    assert CliRunner().invoke(app, ["push", "nowhere", "alice/broken"]).exit_code == 2
