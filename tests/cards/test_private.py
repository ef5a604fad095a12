"""No token, no path, no user, no local base on a card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_reg.cards import card_of, check_metadata, facts_of, write_card
from hf_reg.cards.private import is_private, public, repo_id_or_none, secrets_in

from .runs import bert, tlm


TOKEN = "hf_" + "aB3" * 12


@pytest.fixture
def wilhelmina(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user, and her home."""
    for variable in ("USER", "LOGNAME"):
        monkeypatch.setenv(variable, "wilhelmina")
    home = tmp_path / "home" / "wilhelmina"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    return home


class _Chatty(TrainerCallback):
    """Puts all sorts of things into the logs."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        state.log_history[-1] |= {"note": f"of wilhelmina, {TOKEN}", "eval_/home/wilhelmina/data_loss": 1.0}


def test_nothing_private_gets_onto_the_card_of_a_run(wilhelmina: Path) -> None:
    model = bert()
    model.config._name_or_path = str(wilhelmina / "base")
    model.config.note = f"wilhelmina {TOKEN}"
    model.config.label2id = {"wilhelmina": 0, TOKEN: 1}
    trainer = tlm(wilhelmina / "out", model, hub_token=TOKEN, run_name="wilhelmina's run")
    trainer.state.log_history += [{"step": 4, f"eval_{TOKEN}": 1.0, "eval_wilhelmina_loss": 2.0, "eval_loss": 0.5}]
    trainer.add_callback(_Chatty())
    trainer.log({"loss": 1.0})
    trainer._patches[0].__dict__["submodel"] = str(wilhelmina)  # settings are shown: what if one is a path?
    trainer.penalties[0].scope = [f"{wilhelmina}/*", TOKEN]
    path = write_card(wilhelmina, trainer)
    for written in (path, wilhelmina / "hf_reg_card.json", wilhelmina / "learning_curve.png"):
        for secret in (b"wilhelmina", TOKEN.encode(), str(wilhelmina).encode(), b"/home"):
            assert secret not in written.read_bytes(), (written.name, secret)
    text = path.read_text()
    assert "(local, left out)" in text and "has no public name here" in text and "base_model" not in text
    assert check_metadata(text) == []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")  # what is left out is no value
    trainer.create_model_card(model_name="wilhelmina")  # `Trainer.push_to_hub` gives the name of the folder
    assert "wilhelmina" not in (wilhelmina / "out" / "README.md").read_text()


@pytest.mark.parametrize("fact", ["description", "name", "hardware", "limits", "cost_against", "baseline_is"])
def test_what_is_given_is_refused(fact: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"results": {"f1": 0.5}, "baseline": {"f1": 0.4}, "cost": 1.0}
    given["history"] = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]  # a curve could be drawn
    for secret in (TOKEN, "/home/someone/run", "see ~/runs", r"C:\Users\someone"):
        with pytest.raises(ValueError, match="It holds the (token hf_aB3...|path)"):
            write_card(tmp_path, bert(), **given, **{fact: f"as in {secret}"})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="one of the marks"):
        card_of(bert(), description="<!-- hf_reg:end -->")


def test_base_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)

    def base(name: str, commit: str | None = None) -> tuple[str | None, str | None, bool]:
        model = bert()
        model.config._name_or_path, model.config._commit_hash = name, commit
        facts = facts_of(model)
        return facts.base_model, facts.base_revision, facts.base_is_local

    assert base("bert-base-cased", "abc123") == ("bert-base-cased", "abc123", False)
    assert base("owner/name") == ("owner/name", None, False)
    for local in (str(tmp_path), "runs/base", "./base", "../base", "base", "a/b/c", r"C:\base"):
        assert base(local) == (None, None, True), local
    assert base("") == (None, None, False)
    card = card_of(bert(), base_model="owner/name", base_revision="abc123")
    assert card.data.base_model == "owner/name" and card.data["base_model_relation"] == "finetune"
    assert "(revision `abc123`)" in str(card)
    model = bert()
    model.config._name_or_path, model.config._commit_hash = "owner/name", "abc123"
    assert facts_of(model, base_model="owner/other").base_revision is None


def test_private_and_public() -> None:
    assert (
        secrets_in("https://huggingface.co/papers/2310.18738 log pi(y)/pi_ref(y) rewards/chosen w/o a/b/c 1 / 2") == []
    )
    assert len(secrets_in(f"{TOKEN} and /data/runs/7")) == 2 and TOKEN not in str(secrets_in(TOKEN))
    assert is_private("/data") and not is_private("model.encoder") and not is_private("*.query.weight")
    assert public({3, 1}) == "[1, 3]" and public(1e-5) == "1e-05" and public(lambda: 0) == "(a function)"
    assert public(object()) == public("~/x") == "(local, left out)"
    assert repo_id_or_none(f"owner/{TOKEN}") is None and repo_id_or_none(3) is None
