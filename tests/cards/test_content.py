"""What a card says, and that it is true."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from hf_reg import RegularizedTrainer, patch_model
from hf_reg.cards import Facts, Use, card_of, check_metadata, facts_of, write_card
from hf_reg.cards.methods import MEASURED, cost_of, method_of
from hf_reg.optimizers import COMPANIONS, DecoupledL2SP
from hf_reg.patching import known_patches
from hf_reg.recipes import known_penalties
from hf_reg.seams.attention import gates

from ..preferences import models
from .runs import IDS, RUNS, bert


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", RUNS)
def test_the_card_of_a_run_is_valid_and_complete(name: str, trainers: dict[str, Any]) -> None:
    card = card_of(trainers[name])
    text = str(card)
    assert check_metadata(text) == []
    assert card.data.library_name == ("transformers" if name == "tlm" else "peft")
    assert card.data.pipeline_tag == ("text-classification" if name == "tlm" else "text-generation")
    for said in (
        "hf_reg",
        "seed",
        "transformers 5",
        "torch 2",
        "1 x CPU",
        "Limits",
        "**No baseline was run**",
        "from_pretrained",
    ):
        assert said in text, said
    assert "base_model" not in text.partition("\n---\n")[0]
    assert not re.search(r"\n\n\n|\{\{|\{%|None", text)


def test_methods_with_formula_source_and_settings(trainers: dict[str, Any]) -> None:
    card = card_of(trainers["tlm"])
    text = str(card)
    assert card.data.tags == ["hf_reg", "tlm", "l2_sp", "arxiv:2310.18738", "arxiv:1802.01483"]
    assert "https://huggingface.co/papers/2310.18738" in text and "softmax(Q K^T / sqrt(d) + M) V" in text
    assert "`rate=0.2`" in text and "v_shape(" in text and "`weight=0.01`" in text and "`weight=0.1`" in text
    assert "2 of 2 in model (BertForSequenceClassification)" in text or "2 of 2" in text
    assert "whose code is not part of this card" in text  # of the user's function
    sorsa = str(card_of(trainers["sorsa"]))
    assert "arxiv:2409.00055" in sorsa and "L_reg = " in sorsa and "`gamma=0.0004`" in sorsa and "`r=4`" in sorsa
    assert "plain LoRA of twice the rank" in sorsa
    rpo = str(card_of(trainers["rpo"]))
    assert trainers["rpo"].args.formula in rpo and "with the adapter off" in rpo and "`rewards/margins`" in rpo


def test_every_method_has_a_formula_and_a_source() -> None:
    found = [("patch", name) for name in known_patches()] + [("penalty", name) for name in known_penalties()]
    found += [("companion", name) for name in COMPANIONS]
    assert len(found) > 10
    for kind, name in [*found, ("adapter", "sorsa"), ("adapter", "ba_lora"), ("adapter", "lora")]:
        method = method_of(Use(kind, name))
        assert method.summary and method.formula, name
        assert bool(method.paper) is (name not in ("l1", "l2", "ffn_dropout", "standout")), name  # which are on arXiv
    assert method_of(Use("loss", "rpo")).paper == "2405.16436" and method_of(Use("patch", "gone")).summary == ""
    assert "user's own" in method_of(Use("penalty", "l2_sp", method="custom")).summary
    assert method_of(Use("penalty", "anchor", method="l2_sp")).paper == "1802.01483"


def test_the_quoted_costs_are_measured_ones() -> None:
    for name, row in MEASURED.items():
        method, _, variant = name.partition(", ")
        cost = cost_of(Use("patch", method, {variant: "True"} if variant else {}))
        assert cost is not None and cost[:4] == row and 0.2 < cost.ratio < 3
    for name in ("l2_sp", "r_drop", "confidence"):
        cost = cost_of(Use("penalty", name))
        assert cost is not None and cost.ours == name and "peak memory" not in cost.case
    assert cost_of(Use("patch", "head_mask")) is None


def test_companions_are_on_the_card(tmp_path: Path) -> None:
    from ..adapters.models import build
    from ..adapters.test_storage import batches
    from ..checkpoints.test_block import arguments

    trainer = RegularizedTrainer(
        model=build(),
        args=arguments(tmp_path),
        train_dataset=batches(),
        companions={"decoupled_l2_sp": {"alpha": 0.3}},
    )
    trainer.save_model(str(tmp_path / "out"))
    for source in (trainer, tmp_path / "out"):
        text = str(card_of(source))
        assert "`decoupled_l2_sp` (companion)" in text and "`alpha=0.3`" in text and "arxiv:1802.01483" in text
        assert DecoupledL2SP.FORMULA in text and "give the trainer `companions=`" in text
        assert "No patch" not in text


def test_results_beside_the_baseline(trainers: dict[str, Any]) -> None:
    facts = facts_of(trainers["tlm"])
    assert set(facts.results) >= {"loss", "accuracy"} and facts.results_from == "the last evaluation (step 3)"
    assert facts.results["loss"] == trainers["tlm"].state.log_history[-1].get("eval_loss", facts.results["loss"])
    text = str(card_of(facts, results={"accuracy": 0.75}, baseline={"eval_accuracy": 0.5}, datasets="owner/news"))
    assert "| `accuracy` | 0.75 | 0.5 | +0.25 |" in text and "No baseline" not in text
    assert "owner/news" in text
    many = str(card_of(facts, results={"accuracy": [0.7, 0.8]}, baseline={"accuracy": [0.6, 0.6]}, seeds=[0, 1]))
    assert (
        "| `accuracy` | 0.75 ± 0.071 | 0.6 ± 0 | +0.15 |" in many and "over 2 seeds" in many and "One seed" not in many
    )
    with pytest.raises(ValueError, match=r"baseline has \['f1'\]"):
        card_of(facts, results={"accuracy": 0.7}, baseline={"f1": 0.5})


def test_model_index(trainers: dict[str, Any]) -> None:
    assert "model-index" not in str(card_of(trainers["tlm"]))  # the data has no name
    card = card_of(trainers["tlm"], datasets=["owner/news"], results={"accuracy": [0.7, 0.8], "loss": math.nan})
    index = card.data.to_dict()["model-index"]
    assert index[0]["results"][0]["dataset"] == {"name": "owner/news", "type": "owner/news"}
    assert [(one["type"], one["value"]) for one in index[0]["results"][0]["metrics"]] == [("accuracy", 0.75)]
    assert card.data.metrics == ["accuracy"] and "not finite" in str(card)


def test_measured_cost_counts_more_than_the_table(trainers: dict[str, Any]) -> None:
    assert "1.01 times (against: no dropout" in str(card_of(trainers["tlm"])) and "`spread`: not measured" in str(
        card_of(trainers["tlm"])
    )
    text = str(card_of(trainers["tlm"], cost=1.25, cost_against="plain Trainer"))
    assert "took 1.25 times as long as one of plain Trainer" in text and "1.01 times" not in text


def _blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("name", RUNS)
def test_the_code_of_the_card_loads_the_model(
    name: str, trainers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainers[name]
    saved = trainer.args.output_dir
    models.llama().save_pretrained(tmp_path / "base")
    batch = {"input_ids": IDS[None]}
    expected = trainer.model.eval()(**batch).logits
    blocks = _blocks(str(card_of(trainer)))
    assert len(blocks) == (1 if name == "rpo" else 2)
    for number, block in enumerate(blocks):
        assert ("hf_reg" in block) is (number == 1)
        names: dict[str, Any] = {}
        exec(block.replace("OWNER/NAME", saved).replace("BASE", str(tmp_path / "base")), names)
        torch.testing.assert_close(names["model"].eval()(**batch).logits, expected, atol=1e-5, rtol=1e-5)
        if name == "tlm":
            patches = [gate.patch for gate in gates(names["model"])]
            assert patches == ([gate.patch for gate in gates(trainer.model)] if number else [])
        if name == "sorsa" and number:
            assert names["model"].peft_config["default"].METHOD == "sorsa"
        if number and isinstance(names["model"], PeftModel):
            assert names["model"].get_nb_trainable_parameters()[0] > 0


def test_a_folder_and_a_model_say_the_same(trainers: dict[str, Any], folder: Path) -> None:
    for name in RUNS:
        live, saved = facts_of(trainers[name]), facts_of(trainers[name].args.output_dir)
        assert saved.pipeline_tag == live.pipeline_tag and saved.auto_class == live.auto_class, name
        assert saved.adapter == live.adapter, name
    assert facts_of(trainers["sorsa"].args.output_dir).methods[0].settings["r"] == "4"
    block = {
        "version": "0.0.9",
        "patches": {"tlm": {"rate": 0.3, "mode": "self", "schedule": {"v_shape": {"warmup": 0.2}}}},
        "penalties": {"anchor": {"method": "l2_sp", "weight": 0.5}, "spread": {"method": "custom", "weight": 1}},
        "seed": 7,
        "versions": {"torch": "2.6.0"},
    }
    model = bert()
    model.config.hf_reg = block
    model.save_pretrained(folder)
    for source in (model, folder):
        facts = facts_of(source)
        assert [(use.name, use.method) for use in facts.methods] == [
            ("tlm", ""),
            ("anchor", "l2_sp"),
            ("spread", "custom"),
        ]
        assert facts.methods[0].settings == {"rate": "0.3", "mode": "'self'", "schedule": "v_shape(warmup=0.2)"}
        assert facts.seeds == [7]
        assert facts.versions == {"torch": "2.6.0", "hf_reg": "0.0.9"}
    patch_model(model, "tlm", rate=0.4)  # what is on the model counts more than what its block says
    assert [use.settings.get("rate") for use in facts_of(model).methods] == ["0.4", None, None]


def test_the_block_of_an_adapter(trainers: dict[str, Any], folder: Path) -> None:
    for name in ("sorsa", "rpo"):
        shutil.copytree(trainers[name].args.output_dir, folder / name)
        path = folder / name / "hf_reg.json"
        own = json.loads(path.read_text()) if path.exists() else {"hf_reg_version": "0.1.0"}
        path.write_text(json.dumps(own | {"hf_reg": {"patches": {"tlm": {"rate": 0.1}}, "penalties": {}, "seed": 3}}))
        facts = facts_of(folder / name)
        assert [use.name for use in facts.methods] == [
            "lora" if name == "rpo" else "sorsa",
            "tlm",
        ] and facts.seeds == [3]
        assert 'load_regularized("OWNER/NAME", auto_class="AutoModelForCausalLM", base=' in str(card_of(folder / name))


def test_a_folder_keeps_the_facts_of_its_run(trainers: dict[str, Any], folder: Path) -> None:
    write_card(folder, trainers["tlm"], baseline={"accuracy": 0.5})
    first = (folder / "README.md").read_bytes()
    assert (folder / "learning_curve.png").is_file() and b"](learning_curve.png)" in first
    write_card(folder)
    assert (folder / "README.md").read_bytes() == first
    write_card(folder, license="mit")
    assert b"license: mit" in (folder / "README.md").read_bytes() and b"| `accuracy` |" in first
    assert Facts.from_json((folder / "hf_reg_card.json").read_text()).license == "mit"


def test_trainer_state_in_a_folder(trainers: dict[str, Any], folder: Path) -> None:
    shutil.copytree(trainers["tlm"].args.output_dir, folder, dirs_exist_ok=True)
    (folder / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 2, "eval_f1": 0.5}, {"loss": "x"}]})
    )
    facts = facts_of(folder)
    assert facts.results == {"f1": 0.5} and facts.results_from == "the last evaluation (step 2)"
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        facts_of(folder)
    for text in ("{", '{"of_tomorrow": 1}'):
        (folder / "hf_reg_card.json").write_text(text)
        with pytest.raises(ValueError, match="no facts of a card of this version"):
            facts_of(folder)


def test_what_is_no_source_and_no_fact(folder: Path) -> None:
    with pytest.raises(ValueError, match="neither config.json nor adapter_config.json"):
        card_of(folder)
    with pytest.raises(TypeError, match="a Trainer, a model or a folder; got int"):
        card_of(3)
    with pytest.raises(TypeError, match="no fact 'licence'. Did you mean 'license'"):
        card_of(bert(), licence="mit")
    with pytest.raises(TypeError, match=r"results\['f1'\] is 'high'"):
        card_of(bert(), results={"f1": "high"})
    with pytest.raises(ValueError, match="license is 'Apache 2.0'"):
        card_of(bert(), license="Apache 2.0")
    with pytest.raises(ValueError, match="base_model has '../base'"):
        card_of(bert(), base_model="../base")
    with pytest.raises(ValueError, match="is no folder"):
        write_card(folder / "missing", bert())
    assert "no patch, penalty" in str(card_of(bert())) and "not evaluated on held-out" in str(card_of(bert()))
