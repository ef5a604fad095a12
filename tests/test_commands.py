"""`hf-reg methods`, `inspect` and `merge`: what they say is what the library does, and user errors are one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments
from typer.testing import CliRunner, Result

import hf_reg
from hf_reg import describe, get_regularized_peft_model, patch_model, unpatch_model
from hf_reg.cli import app
from hf_reg.commands.catalogue import CATALOGUE, entry_of
from hf_reg.commands.docstrings import arguments, body, plain
from hf_reg.commands.inspection import build_empty, inspect_model, trial_settings
from hf_reg.commands.methods import TITLES, known_methods
from hf_reg.optimizers import COMPANIONS, strong_weight_decay
from hf_reg.patches import PATCHES, TLM
from hf_reg.penalties import PENALTIES
from hf_reg.sites.attention import find_attention

from .adapters.models import FAMILIES, build, config_of
from .architectures import MODEL_TYPES, NotBuilt
from .architectures import build as build_tiny
from .distributed.launch import environment
from .preferences.words import tokenizer
from .quoted_costs import COSTS, RESULTS, requote
from .tiny_runs import trained, write


def run(*options: str) -> Result:
    return CliRunner().invoke(app, [*options])


def said(*options: str) -> Any:
    done = run(*options, "--json")
    assert done.exit_code == 0, done.output + repr(done.exception)
    return json.loads(done.stdout)


def refused(*options: str, code: int = 2) -> str:
    done = run(*options)
    assert done.exit_code == code, done.output + repr(done.exception)
    lines = [line for line in done.stderr.splitlines() if line.startswith("hf-reg ")]
    assert len(lines) == 1 and "Traceback" not in done.output, done.output
    return lines[0].partition(": ")[2]


# ---- methods


def test_methods_lists_every_method() -> None:
    rows = said("methods")
    by_kind = {kind: [row["name"] for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}
    assert by_kind == {
        "patch": list(PATCHES), "penalty": list(PENALTIES), "companion": list(COMPANIONS), "loss": ["stablemax"],
        "preset": ["strong_weight_decay"], "adapter": ["sorsa", "balora"],
        "rpo variant": ["rpo-cumulative", "rpo-average", "rpo-trl"],
    }  # fmt: skip
    assert all(row["description"].rstrip(".:") and row["settings"] for row in rows)
    assert next(row for row in rows if row["name"] == "tlm")["settings"]["rate"] == 0.1
    table = run("methods")
    assert table.exit_code == 0
    assert all(row["name"] in table.output for row in rows)
    for title in TITLES.values():
        assert title in table.output


def test_every_method_has_an_entry_and_says_where_its_defaults_come_from() -> None:
    known = known_methods()
    assert {method.name for method in known} == set(CATALOGUE) | set(PATCHES) | set(COMPANIONS)
    for method in known:
        assert method.entry is not None and method.entry.definition and method.entry.paper, method.name
    for method in known:
        assert method.entry is not None and method.entry.definition and method.entry.paper
        unsaid = [name for name in method.settings if not method.said.get(name)]
        assert not unsaid, (method.name, unsaid)


@pytest.mark.parametrize("name", sorted({*CATALOGUE, *PATCHES, *COMPANIONS}))
def test_one_method_in_full(name: str) -> None:
    found, shown = said("methods", name), run("methods", name)
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.stdout.split())
    assert name in text and " ".join(found["example"].split()) in text
    for setting in found["settings"]:
        assert setting in text
    for one in found["cost"]["measured"]:
        assert f"{one['ratio']:.3f}" in text
    assert found["cost"]["measured"] or "has not been measured" in text


def test_what_is_said_of_tlm() -> None:
    found = said("methods", "tlm")
    assert found["settings"]["rate"]["default"] == 0.1
    assert "default of the authors' code" in found["settings"]["rate"]["meaning"]
    assert "negative ones count from the end" in found["settings"]["layers"]["meaning"]  # what "see Patch" refers to
    assert any("Where we deviate" in note for note in found["notes"])
    assert "2310.18738" in found["paper"]
    ratios = {(one["case"], one["peer"]): one["ratio"] for one in found["cost"]["measured"]}
    assert ("MiniLM step, 16 x 128", "no dropout") in ratios and "one thread" in found["cost"]["conditions"]


def test_the_examples_of_patches_and_recipes_work() -> None:
    from hf_reg.recipes import make_companions, make_penalties
    from hf_reg.yaml_text import load_yaml

    for name, cls in PATCHES.items():
        model = build("llama")
        names = {
            "patch_model": patch_model,
            "model": model,
            "get_peft_model": get_peft_model,
            "LoraConfig": LoraConfig,
        }
        eval(entry_of(name, cls).example, names)  # noqa: S307
        assert name in str(describe(model))
    for name, companion in COMPANIONS.items():
        found = load_yaml(entry_of(name, companion).example)["train"]["companions"]
        assert type(make_companions(found)[0]) is companion
    args = TrainingArguments("unused", use_cpu=True)
    eval(CATALOGUE["strong_weight_decay"].example, {"strong_weight_decay": strong_weight_decay, "args": args})  # noqa: S307
    assert args.weight_decay == 3
    for name, entry in CATALOGUE.items():
        if name in PATCHES or name in ("stablemax", "strong_weight_decay"):
            continue
        if name in PENALTIES and name != "ewc":  # which needs a loader
            assert make_penalties(load_yaml(entry.example)["penalties"])[0].name == name
        elif name != "ewc":
            assert load_yaml(entry.example)


def test_the_costs_are_those_of_the_benchmark() -> None:
    found = requote(COSTS.read_text(), RESULTS.read_text())
    assert found == COSTS.read_text(), "quote them anew: python -m tests.quoted_costs"


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    assert refused("methods", "tml").startswith("'tml' is no method. Did you mean 'tlm'? Known: tlm, drophead")
    assert "Did you mean 'l2_sp'?" in refused("methods", "l2sp", "--json")


def test_docstrings() -> None:
    found = arguments(TLM)
    assert found["spare_token_ids"].startswith("Ids that are never selected")
    assert body(TLM)[0].startswith("From Token-Level Masking for Transformers (EMNLP")
    assert not any(paragraph.startswith(("Args", "rate")) for paragraph in body(TLM))
    assert plain("see [`~hf_reg.base.Penalty`] and [`X`](a/b.py), *so*, a * b * c") == (
        "see Penalty and X, so, a * b * c"
    )


# ---- inspect


KINDS = ["bert", "deberta-v2", "modernbert", "gpt2", "llama", "t5", "bart", "vit", "clip", "jamba", "whisper", "swin",
         "mamba", "resnet"]  # fmt: skip


def save_config(model: Any, folder: Path) -> str:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return str(folder)


def notes(row: Any) -> str:
    """The notes of a row, but for what is of the weights: an inspected model has none."""
    return "" if PATCHES[row.method].replaces_parameters else row.notes


def expected(model: Any) -> tuple[list[tuple[Any, ...]], dict[str, str], int, dict[str, int]]:
    """What `patch_model` does to the real model, method by method."""
    rows, refusals = [], {}
    plain_one: Any = describe(model)
    for name in PATCHES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                patch_model(model, name, **trial_settings(name, find_attention(model)))
            except ValueError as error:
                refusals[name] = str(error)
                continue
        described: Any = describe(model)
        rows += [(row.method, row.submodel, row.patched, row.found, row.backend, notes(row)) for row in described.rows]
        unpatch_model(model)
    return rows, refusals, plain_one.found, plain_one.uncovered


def check_inspection(kind: str, folder: Path) -> None:
    model = build_tiny(kind).model
    found = inspect_model(save_config(model, folder))
    rows, refusals, attention, uncovered = expected(model)
    assert found.architecture == type(model).__name__
    assert [(r.method, r.submodel, r.patched, r.found, r.backend, r.notes) for r in found.rows] == rows
    assert found.refused == refusals
    assert (found.attention, found.uncovered) == (attention, uncovered)


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_counts_what_patch_model_patches(kind: str, tmp_path: Path) -> None:
    check_inspection(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_inspect_on_every_architecture(kind: str, tmp_path: Path) -> None:
    try:
        check_inspection(kind, tmp_path)
    except NotBuilt as error:
        pytest.skip(str(error))


def test_inspect_counts_what_adapters_take(tmp_path: Path) -> None:
    for family in FAMILIES:
        model = build(family)
        found = inspect_model(save_config(model, tmp_path / family)).adapters
        for row, targets in zip(found, (None, "all-linear"), strict=True):
            task = "SEQ_CLS" if family == "bert" else None
            adapted = get_peft_model(build(family), LoraConfig(r=1, target_modules=targets, task_type=task))
            taken = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
            assert row.modules == len(taken) == sum(row.names.values()) > 0


def test_inspect_makes_no_weights_and_draws_nothing(tmp_path: Path) -> None:
    model = build("llama")
    save_config(model, tmp_path)
    state = torch.get_rng_state()
    empty, _ = build_empty(transformers.AutoConfig.from_pretrained(tmp_path))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, _ in empty.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_inspect_on_the_command_line(tmp_path: Path) -> None:
    place = save_config(build_tiny("t5").model, tmp_path)
    found = said("inspect", place)
    assert found["model"] == place and found["model_type"] == "t5"
    assert {(row["method"], row["submodel"]) for row in found["rows"]} >= {("tlm", "encoder (T5Stack)")}
    shown = run("inspect", place)
    assert shown.exit_code == 0 and "would patch / found" in shown.stdout and "all-linear" in shown.stdout
    jamba = run("inspect", save_config(build_tiny("jamba").model, tmp_path / "jamba"))
    assert "Out of reach, runs unregularized" in jamba.stdout


def test_a_class_that_is_not_named(tmp_path: Path) -> None:
    config = build("bert").config
    for names, reason in ((None, "names no class"), (["Odd"], "names Odd, which transformers does not have")):
        config.architectures = names
        config.save_pretrained(tmp_path)
        found = inspect_model(str(tmp_path))
        assert found.architecture == "BertModel" and reason in found.chosen


def test_inspect_never_runs_code_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    kinds: list[tuple[dict[str, str], int]] = [({"model_type": "odd"}, 1), ({}, 1), ({"model_type": "bert"}, 0)]
    for kind, code in kinds:
        config = {**kind, "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        done = run("inspect", str(tmp_path))
        assert done.exit_code == code, done.output
        if code:
            assert "Its code comes with the model, and such code is never run." in " ".join(done.stderr.split())
    assert not (tmp_path / "ran").exists()


def test_models_that_cannot_be_inspected(tmp_path: Path) -> None:
    assert refused("inspect", "./nowhere").startswith("MODEL: './nowhere' is no folder here.")
    assert refused("inspect", str(tmp_path), code=1).startswith(f"the configuration of {tmp_path} cannot be read:")
    assert "cannot be read" in refused("inspect", "none/such", code=1)
    (tmp_path / "config.json").write_text("{no json")
    assert "cannot be read" in refused("inspect", str(tmp_path), code=1)
    (tmp_path / "config.json").write_text('{"model_type": "bret"}')
    assert "model_type is 'bret', which transformers" in refused("inspect", str(tmp_path), "--json", code=1)


# ---- merge


def adapter_folder(folder: Path, method: str, family: str) -> tuple[Path, Any]:
    """A saved adapter whose factors have moved, its base beside it, and the adapted model."""
    base = build(family)
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    reloaded = type(base).from_pretrained(folder / "base")
    if method == "lora":
        model = get_peft_model(reloaded, LoraConfig(r=4, target_modules="all-linear", task_type=FAMILIES[family][1]))
    else:
        model = get_regularized_peft_model(reloaded, config_of(method, family))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model.eval()


@pytest.mark.parametrize(("method", "family"), [("lora", "llama"), ("sorsa", "llama"), ("ba_lora", "bert"),
                                                ("lora", "gpt2"), ("lora", "t5")])  # fmt: skip
def test_the_merged_model_is_the_adapted_one(tmp_path: Path, method: str, family: str) -> None:
    adapter, model = adapter_folder(tmp_path, method, family)
    found = said("merge", str(adapter), str(tmp_path / "merged"))
    assert found["report"]["dtype"] == "torch.float32" and found["report"]["relative"] < 1e-4
    assert found["tokenizer"] == "base" and (tmp_path / "merged" / "tokenizer.json").is_file()
    merged = getattr(transformers, FAMILIES[family][0]).from_pretrained(tmp_path / "merged").eval()
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
    with torch.no_grad():
        new, old = merged(**batch).logits, model(**batch).logits
        with model.disable_adapter():
            plain_logits = model(**batch).logits
    assert torch.allclose(new, old, atol=1e-4 * float(old.abs().max()))
    assert float((old - plain_logits).abs().max()) > 1e-2 * float(old.abs().max())
    keys = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert not [key for key in keys if "lora" in key or "base" in key]


def test_a_trained_run_is_merged(tmp_path: Path) -> None:
    for task in ("sequence-classification", "token-classification", "question-answering", "seq2seq"):
        (tmp_path / task).mkdir()
        recipe = write(tmp_path / task, task)
        if task == "sequence-classification":  # of three classes, which the base model does not know
            rows = [{"text": "one two", "label": label} for label in "abc"]
            (tmp_path / task / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        trained(recipe, "--set", "train.max_steps=1")
        found = said("merge", str(tmp_path / task / "out"), str(tmp_path / task / "merged"))
        assert found["tokenizer"] == "adapter" and found["report"]["layers"] > 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sequence-classification" / "merged")
    assert merged.num_labels == 3
    AutoTokenizer.from_pretrained(tmp_path / "seq2seq" / "merged")


def test_half_precision_is_merged_in_fp32(tmp_path: Path) -> None:
    adapter, _ = adapter_folder(tmp_path, "lora", "llama")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    done = run("merge", str(adapter), str(tmp_path / "merged"), "--base", str(tmp_path / "half"))
    assert done.exit_code == 0 and "largest change of a logit" in done.stdout, done.output
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32), adapter
    )
    want = exact.merge_and_unload().state_dict()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_a_failed_merge_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = adapter_folder(tmp_path, "lora", "llama")
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_reg.commands.merging._save_tokenizer", full)
    message = refused("merge", str(adapter), str(tmp_path / "merged"), code=1)
    assert message == f"{tmp_path}/merged cannot be written: No space left on device"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    shutil.copytree(tmp_path / "base", tmp_path / "merged")
    was = (tmp_path / "merged" / "model.safetensors").read_bytes()
    refused("merge", str(adapter), str(tmp_path / "merged"), "--force", code=1)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == was
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "merged"])


def test_outputs_are_not_overwritten(tmp_path: Path) -> None:
    adapter, _ = adapter_folder(tmp_path, "lora", "llama")
    shutil.copytree(tmp_path / "base", tmp_path / "merged")
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert "is not empty. Give another folder, or --force" in refused("merge", str(adapter), str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before
    assert said("merge", str(adapter), str(tmp_path / "merged"), "--force")["tokenizer"] == "base"
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() != before
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "letter.txt").touch()
    message = refused("merge", str(adapter), str(tmp_path / "things"), "--force")
    assert "holds other things than a model" in message and (tmp_path / "things" / "letter.txt").exists()
    for place in (tmp_path, tmp_path / "base", adapter):
        assert "which is read. Give another folder." in refused("merge", str(adapter), str(place), "--force")
    (tmp_path / "file").touch()
    assert "is a file. Give a folder." in refused("merge", str(adapter), str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    assert run("merge", str(adapter), str(tmp_path / "empty")).exit_code == 0


def test_adapters_that_cannot_be_merged(tmp_path: Path) -> None:
    out = str(tmp_path / "merged")
    assert "is not there. Give a folder" in refused("merge", str(tmp_path / "nowhere"), out)
    assert "has no adapter_config.json" in refused("merge", str(tmp_path), out)
    adapter, _ = adapter_folder(tmp_path, "lora", "llama")
    assert "is no folder here. Give --base" in refused("merge", str(adapter), out, "--base", "./nowhere")
    assert "the base model none/such cannot be loaded" in refused(
        "merge", str(adapter), out, "--base", "none/such", code=1
    )
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    assert "names no base model. Give --base." in refused("merge", str(adapter), out)
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "task_type": None}))
    assert "says no class of transformers" in refused("merge", str(adapter), out, code=1)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "Only safetensors are read" in refused("merge", str(adapter), out)
    assert not Path(out).exists()


# ---- all of them


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = """
import sys
from typer.testing import CliRunner
from hf_reg.cli import app
for command in ([], ["methods"], ["inspect"], ["merge"], ["train"], ["demo"]):
    done = CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0, done.output
    print(done.output)
assert not {"torch", "transformers", "datasets", "peft", "numpy"} & set(sys.modules), "slow"
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("methods", "inspect", "merge", "train", "demo", "--json", "--install-completion", "--force"):
        assert part in re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


def test_wrong_use_is_exit_code_2() -> None:
    for options in (["nothing"], ["methods", "--what"], ["inspect"], ["merge", "one"]):
        done = run(*options)
        assert done.exit_code == 2 and "Traceback" not in done.output


def test_completion_is_offered() -> None:
    done = CliRunner().invoke(app, [], prog_name="hf-reg", env={"_HF_REG_COMPLETE": "complete_bash",
                              "COMP_WORDS": "hf-reg ins", "COMP_CWORD": "1"})  # fmt: skip
    assert "inspect" in done.output


def test_the_command_package_is_installed() -> None:
    text = (Path(hf_reg.__file__).parents[1] / "pyproject.toml").read_text()
    assert '"hf_reg.commands"' in text and (Path(hf_reg.__file__).parent / "costs.md").is_file()
