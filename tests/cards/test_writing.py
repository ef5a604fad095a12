"""A card that is there keeps what others wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from hf_reg.cards import BEGIN, END, check_metadata, write_card

from .runs import bert, tlm


MINE = """---
license: mit
language: [de]
pipeline_tag: fill-mask
tags:
- mine
widget:
- text: Hallo
model-index:
- name: mine
  results:
  - task: {type: text-classification}
    dataset: {type: owner/news, name: owner/news}
    metrics:
    - {type: accuracy, name: accuracy, value: 0.1}
    - {type: f1, value: 0.2}
---

# Mine

Ein Absatz.   
"""


def test_a_card_of_the_user_is_kept_and_updated(folder: Path) -> None:
    (folder / "README.md").write_text(MINE)
    given: dict[str, Any] = {"results": {"accuracy": 0.9}, "datasets": "owner/news"}
    text = write_card(folder, bert(), **given).read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    body = text.partition("\n---\n")[2]
    assert body.startswith("\n# Mine\n\nEin Absatz.   \n\n" + BEGIN)
    data = ModelCard(text).data
    assert data.license == "mit" and data.language == ["de"] and data["widget"] == [{"text": "Hallo"}]
    assert data.tags == ["mine", "hf_reg"] and data.pipeline_tag == "text-classification"
    assert data.datasets == ["owner/news"] and data.model_name == "mine"
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("f1", 0.2), ("accuracy", 0.9)]
    assert write_card(folder, bert(), **given).read_text() == text  # again: the same
    (folder / "README.md").write_text(text.replace("Ein Absatz.", "Zwei.") + "\nDahinter.\n")
    again = write_card(folder, bert(), results={"accuracy": 0.8}, datasets="owner/news").read_text()
    assert "Zwei." in again and again.endswith(END + "\n\nDahinter.\n") and "0.8" in again and "0.9" not in again
    assert check_metadata(again) == []


def test_line_ends_and_cards_without_metadata(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n# Mine\r\n")
    written = write_card(folder, bert()).read_bytes()
    assert written.count(b"\n") == written.count(b"\r\n") and b"# Mine\r\n\r\n<!-- hf_reg:begin -->\r\n" in written
    assert write_card(folder, bert()).read_bytes() == written
    (folder / "README.md").write_text("# Mine, without metadata\n")
    text = write_card(folder, bert()).read_text()
    assert "# Mine, without metadata\n" in text and check_metadata(text) == []
    (folder / "README.md").write_text("")
    assert check_metadata(write_card(folder, bert()).read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        BEGIN,
        END,
        f"{END} {BEGIN}",
        f"{BEGIN} {BEGIN} {END} {END}",
        f"{BEGIN} {END} {BEGIN} {END}",
        f"{BEGIN} {BEGIN} {END}",
    ],
)
def test_damaged_marks(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(f"# Mine\n{text}\n")
    with pytest.raises(ValueError, match=r"README.md has \d x <!-- hf_reg:begin --> and \d x"):
        write_card(folder, bert())
    assert (folder / "README.md").read_text() == f"# Mine\n{text}\n" and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("metadata", ["a: [", "- a", "model-index: 3", "model-index: [{name: x}]"])
def test_damaged_metadata(folder: Path, metadata: str) -> None:
    before = f"---\n{metadata}\n---\n# Mine\n"
    (folder / "README.md").write_text(before)
    with pytest.raises(ValueError, match=r"The metadata of .*README.md cannot be read"):
        write_card(folder, bert())
    assert (folder / "README.md").read_text() == before and len(list(folder.iterdir())) == 1


def test_the_form_of_peft_is_replaced_and_its_paths_go(folder: Path, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    base = type(bert()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model.save_pretrained(folder)
    stock = (folder / "README.md").read_text()
    assert str(tmp_path) in stock and "[More Information Needed]" in stock and check_metadata(stock) != []
    text = write_card(folder, model).read_text()
    assert str(tmp_path) not in text and "[More Information Needed]" not in text and check_metadata(text) == []
    data = ModelCard(text).data
    assert data.base_model is None and data.library_name == "peft" and "lora" in data.tags
    (folder / "README.md").write_text(stock.replace("[More Information Needed]", "I know", 1))
    text = write_card(folder, model).read_text()
    assert "I know" in text and str(tmp_path) not in text and text.rstrip().endswith(END)
    model.save_pretrained(folder)  # PEFT writes its path again
    assert str(tmp_path) not in write_card(folder, model).read_text()


def test_a_base_that_the_user_named_stays(folder: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model: owner/base\nbase_model_relation: merge\n---\n# Mine\n")
    data = ModelCard(write_card(folder, bert()).read_text()).data
    assert data.base_model == "owner/base" and data["base_model_relation"] == "merge"


def test_the_trainer_makes_and_pushes_our_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tlm(folder, hub_model_id="owner/name", hub_token="hf_secret")
    pushed: list[Any] = []
    monkeypatch.setattr("hf_reg.hub.push_to_hub", lambda *source, **said: pushed.append((source, said)))
    said = {"tags": "extra", "dataset_tags": ["owner/news"], "license": "mit", "baseline": {"accuracy": 0.5}}
    trainer.push_to_hub(finetuned_from="owner/base", **said)
    assert pushed == [
        (
            (trainer, "owner/name"),
            {"private": None, "token": "hf_secret", "revision": None, "commit_message": "End of training",
             "base_model": "owner/base", "tags": "extra", "datasets": ["owner/news"], "license": "mit",
             "baseline": {"accuracy": 0.5}},
        )
    ]  # fmt: skip
    trainer.create_model_card(model_name="name", repo_id="owner/name", **said)
    text = (folder / "README.md").read_text()
    card = ModelCard(text)
    assert 'from_pretrained("owner/name")' in text and "| `accuracy` |" in text and "hf_secret" not in text
    assert card.data.tags[-1] == "extra" and card.data.datasets == ["owner/news"] and card.data.model_name == "name"
    assert "# name\n" in text and "generated automatically" not in text and check_metadata(text) == []
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    (folder / "README.md").unlink()
    trainer.create_model_card()
    assert not (folder / "README.md").exists()
