"""`hf-reg verify` and `hf-reg push`, and a push with the real verification and the real card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM
from typer.testing import CliRunner

from hf_reg import (
    RegularizedTrainer,
    RegularizedTrainingArguments,
    describe,
    load_regularized,
    patch_model,
    push_to_hub,
)
from hf_reg.cli import app

from ..adapters import models
from ..preferences.models import llama, lora, trainer
from .conftest import TOKEN
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


def test_a_trainer_pushes_by_itself(hub: HubServer, tmp_path: Path) -> None:
    """After `save_model` with `push_to_hub=True`, and when asked; the token is in no file."""
    arguments = RegularizedTrainingArguments(
        str(tmp_path / "run"), hub_token=TOKEN, push_to_hub=True, hub_model_id="alice/by-itself", use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    made = RegularizedTrainer(model=models.build("bert"), args=arguments, patches="tlm", penalties={"l2_sp": 0.01})
    made.save_model()
    assert made.args.hub_token == TOKEN
    assert TOKEN.encode() not in b"".join(path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file())
    card = Path(hf_hub_download("alice/by-itself", "README.md")).read_text()
    assert "l2_sp" in card and "tlm" in card
    made.push_to_hub("again", dataset_tags="alice/news", license="mit")
    files = hub.repositories["alice/by-itself"].commits
    assert len(files) == 3  # of the repository itself, and of each push
    card = Path(hf_hub_download("alice/by-itself", "README.md", revision="main", force_download=True)).read_text()
    assert "license: mit" in card and "alice/news" in card
    with pytest.raises(ValueError, match="Leave blocking out"):
        made.push_to_hub(blocking=False)


def test_an_rpo_run_goes_there_and_back(hub: HubServer, tmp_path: Path) -> None:
    """With the real verification and card; read by stock PEFT, and from the repository by `load_regularized`."""
    made = trainer(tmp_path / "run", lora(moved=0.1), variant="cumulative", beta=0.3)
    made.train()
    push_to_hub(llama(), "alice/base")
    push_to_hub(made, "alice/rpo", base_model="alice/base")
    card = Path(hf_hub_download("alice/rpo", "README.md")).read_text()
    assert "base_model: alice/base" in card and "2405.16436" in card and "beta = 0.3" in card
    ids = torch.arange(5, 15)[None]
    made.model.eval()
    expected = made.model(ids).logits
    stock = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("alice/base"), "alice/rpo").eval()
    torch.testing.assert_close(stock(ids).logits, expected)
    torch.testing.assert_close(load_regularized("alice/rpo").eval()(ids).logits, expected)
    push_to_hub(patch_model(models.build("bert"), "tlm", rate=0.2), "alice/bert")
    assert "0.2" in str(describe(load_regularized("alice/bert")))


def test_what_fails_verification_is_not_pushed(hub: HubServer, bert: Path) -> None:
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    done = CliRunner().invoke(app, ["push", str(bert), "alice/broken"])
    assert done.exit_code == 1 and "alice/broken" not in hub.repositories
    assert CliRunner().invoke(app, ["push", "nowhere", "alice/broken"]).exit_code == 2
