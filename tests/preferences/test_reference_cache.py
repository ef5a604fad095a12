"""Log-probs of the reference computed before training and kept on disk: the same run, nothing twice, nothing stale."""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import HfArgumentParser

import hf_reg
from hf_reg import RPOConfig, RPOTrainer
from hf_reg.penalties import LogitsPenalty
from hf_reg.preferences import PreferenceCollator, precomputed, prepare_preferences
from hf_reg.preferences.data import REFERENCE
from hf_reg.preferences.reference import Reference
from hf_reg.training.fingerprints import model_fingerprint

from ..distributed.launch import launch
from .models import LINEAR, arguments, gradients, llama, lora, one_batch, trainer
from .test_rpo_trainer import scores_by_hand
from .words import PLAIN, TEMPLATE, TURNS, tokenizer


TEXT = "computed before training"


class Forwards:
    """How often a model ran in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        inner.model.register_forward_hook(self.saw)

    def saw(self, module: nn.Module, *_: Any) -> None:
        self.count += not module.training


def counted(folder: Path, model: nn.Module | None = None, **settings: Any) -> tuple[RPOTrainer, int]:
    """A trainer with a cache, and the forwards that it took to make it."""
    model = lora(moved=0.1) if model is None else model
    forwards = Forwards(settings.get("ref_model") or model)
    made = trainer(folder, model, **{"reference_cache": str(folder / "cache"), **settings})
    return made, forwards.count


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").iterdir())


def columns(pairs: Any) -> torch.Tensor:
    return torch.tensor([[pair[name] for name in REFERENCE] for pair in pairs])


def policy(kind: str) -> tuple[Any, Any]:
    """A policy and the model that it is compared with, if it has one of its own."""
    if kind == "pissa":
        return lora(init_lora_weights="pissa", moved=0.1), llama()
    return (lora(moved=0.1), None) if kind == "lora" else (llama(2), llama(3))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full", "pissa"])
def test_the_run_is_the_same(kind: str, bf16: bool, tmp_path: Path) -> None:
    found = []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        model, other = policy(kind)
        made = trainer(
            tmp_path, model, ref_model=other, reference_cache=cache, beta=0.3, eta=0.5, bf16=bf16, max_steps=3,
            pad_to_multiple_of=64, per_device_train_batch_size=3, eval_dataset={"few": PLAIN[:5], "turns": TURNS},
            per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=1,  # padded alike: the same roundings
        )  # fmt: skip
        made.current_gradient_accumulation_steps = 1  # as in a run
        made.model.train()
        if not bf16:  # autocast comes with `train`
            made.compute_loss(made.model, one_batch(made)).backward()
        first = gradients(made.model)
        made._measured[True].clear()
        made.model.zero_grad()
        made.train()
        history = [
            {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
            for entry in made.state.log_history
        ]
        found.append((first, history, {name: p.detach() for name, p in model.named_parameters()}))
    tolerance = 1e-6
    for grads, history, weights in found[1:]:
        for name, value in found[0][0].items():
            torch.testing.assert_close(grads[name], value, rtol=tolerance, atol=tolerance)
        for one, other in zip(history, found[0][1], strict=True):
            assert one == pytest.approx(other, rel=tolerance, abs=tolerance)
        for name, value in found[0][2].items():
            torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance)
    assert found[1][1] == found[2][1] and len(found[0][1]) > 8


def test_values_and_what_is_said(tmp_path: Path) -> None:
    given = prepare_preferences(PLAIN, tokenizer(), max_length=64)
    trainer(tmp_path)
    state = torch.get_rng_state()
    made = trainer(tmp_path, lora(moved=0.1), given, precompute_reference=True, per_device_train_batch_size=3)
    assert torch.equal(state, torch.get_rng_state())
    assert str(made.reference) == f"LlamaForCausalLM with the adapter off, {TEXT} (8 pairs)"
    assert not given.stores_reference and made.train_dataset.stores_reference, "the given pairs are left alone"
    with made.model.eval().disable_adapter():
        expected = scores_by_hand(made.model, one_batch(made)).view(2, -1).T
    torch.testing.assert_close(columns(made.train_dataset), expected)
    made.reference.model = None  # nothing is asked any more
    torch.testing.assert_close(made.reference(one_batch(made)), expected.T.flatten())


def test_a_model_trained_as_a_whole_is_its_own_reference(tmp_path: Path) -> None:
    made = trainer(tmp_path, llama(2), precompute_reference=True, max_steps=2, eval_dataset=PLAIN[:3], beta=0.3)
    assert str(made.reference) == f"LlamaForCausalLM as it is at the start, {TEXT} (11 pairs)"
    before = columns(made.train_dataset)
    torch.testing.assert_close(before, scores_by_hand(llama(2).eval(), one_batch(made)).view(2, -1).T)
    made.train()
    assert made.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert made.state.log_history[1]["rewards/margins"] > 0.01
    assert torch.equal(columns(made.train_dataset), before)
    assert made.evaluate()["eval_rewards/margins"] != 0


@pytest.mark.parametrize("kind", ["lora", "whole", "full"])
def test_data_that_come_later(kind: str, tmp_path: Path) -> None:
    model, other = (llama(2), None) if kind == "whole" else policy(kind)
    made = trainer(tmp_path, model, ref_model=other, precompute_reference=True, eval_dataset=PLAIN[:3])
    made.train()
    rows = [{**row, **dict.fromkeys(REFERENCE, -9.0)} for row in PLAIN]
    assert "eval_loss" in made.evaluate() and "eval_loss" in made.evaluate(rows)
    if kind == "lora":
        wanted = trainer(tmp_path, model, eval_dataset=PLAIN).evaluate()["eval_rewards/margins"]
        assert made.evaluate(PLAIN)["eval_rewards/margins"] == pytest.approx(wanted, rel=1e-5)
        assert made.predict(TURNS).metrics["test_loss"] > 0
        return
    for ask in (made.evaluate, made.predict):
        with pytest.raises(ValueError, match="is gone, and this batch has no ref_chosen_logps .* Give these data"):
            ask(PLAIN)


def test_a_given_model_is_let_go_of(tmp_path: Path) -> None:
    other = llama(3)
    gone = weakref.ref(other)
    made = trainer(tmp_path, llama(2), ref_model=other, precompute_reference=True)
    del other
    gc.collect()
    assert gone() is None
    assert str(made.reference) == f"the given LlamaForCausalLM, {TEXT} (8 pairs)"


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    first, forwards = counted(tmp_path, eval_dataset=PLAIN[:3], per_device_train_batch_size=3)
    assert forwards >= 4, "three batches to train on, one to evaluate"
    text = "LlamaForCausalLM with the adapter off, computed before training (cache {}: {} pairs read, {} computed)"
    assert str(first.reference) == text.format(tmp_path / "cache", 0, 11)
    assert len(files(tmp_path)) == 2
    with safe_open(files(tmp_path)[0], "pt") as file:
        assert file.metadata()["hf_reg_version"] == hf_reg.__version__ and file.metadata()["pairs"] in "38"
        assert file.metadata()["reference"] == "LlamaForCausalLM with the adapter off"
    second, forwards = counted(tmp_path, eval_dataset=PLAIN[:3], per_device_train_batch_size=5)
    assert forwards == 0
    assert str(second.reference) == text.format(tmp_path / "cache", 11, 0)
    assert torch.equal(columns(first.train_dataset), columns(second.train_dataset))
    assert torch.equal(columns(first.eval_dataset), columns(second.eval_dataset))
    third, forwards = counted(tmp_path, eval_dataset=PLAIN[:4])
    assert forwards and str(third.reference) == text.format(tmp_path / "cache", 8, 4)


SETTINGS = {"r": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}


def test_whatever_leaves_the_reference_alone_shares_its_file(tmp_path: Path) -> None:
    counted(tmp_path)
    sorsa = hf_reg.get_regularized_peft_model(llama(), hf_reg.SorsaConfig(**SETTINGS))
    balora = hf_reg.get_regularized_peft_model(llama(), hf_reg.BALoraConfig(**SETTINGS))
    for name, settings in {
        "another adapter": {"model": lora(seed=5, moved=0.3, r=2, target_modules=["q_proj"])},
        "sorsa": {"model": sorsa}, "ba-lora": {"model": balora}, "given": {"model": llama(2), "ref_model": llama()},
        "whole": {"model": llama()}, "patches": {"patches": "tlm"}, "loss": {"beta": 0.3, "variant": "average"},
        "padding": {"pad_to_multiple_of": 16}, "checkpointing": {"gradient_checkpointing": True},
        "a limit that cuts nothing": {"max_length": 63}, "dropout": {"model": lora(lora_dropout=0.5)},
    }.items():  # fmt: skip
        assert counted(tmp_path, **settings)[1] == 0, name  # type: ignore[arg-type]
    assert len(files(tmp_path)) == 1


def test_whatever_changes_the_log_probs_has_a_file_of_its_own(tmp_path: Path) -> None:
    moved = llama()
    moved.model.norm.weight.data[3] += 1e-3
    folded = lora(llama(3), moved=0.1)
    scaled = lora(llama(3), moved=0.1, lora_alpha=1)
    scaled.load_state_dict(folded.state_dict())
    shorter = [{**PLAIN[0], "chosen": " it is"}, *PLAIN[1:]]
    for number, (name, settings) in enumerate({
        "first": {}, "weights": {"model": lora(moved, moved=0.1)}, "dtype": {"model": lora(llama().bfloat16())},
        "configuration": {"model": lora(llama(rms_norm_eps=1e-3))}, "autocast": {"bf16": True},
        "max_length": {"max_length": 28}, "max_prompt_length": {"max_prompt_length": 7},
        "truncation_mode": {"max_length": 28, "truncation_mode": "keep_end"}, "template": {"rows": TURNS},
        "other": {"rows": shorter}, "order": {"rows": PLAIN[::-1]}, "fewer": {"rows": PLAIN[:-1]},
        "given with an adapter": {"model": llama(2), "ref_model": folded},
        "the same, scaled": {"model": llama(2), "ref_model": scaled},
    }.items(), start=1):  # fmt: skip
        assert counted(tmp_path, **settings)[1] > 0, name  # type: ignore[arg-type]
        assert len(files(tmp_path)) == number, name
    words = tokenizer(TEMPLATE.replace("<eos>", ".<eos>"))
    model = lora(moved=0.1)
    forwards = Forwards(model)
    args = arguments(tmp_path, reference_cache=str(tmp_path / "cache"))
    RPOTrainer(model, args, train_dataset=TURNS, processing_class=words)
    assert forwards.count > 0 and len(files(tmp_path)) == number + 1, "template"


def test_the_fingerprint_of_what_is_below_an_adapter() -> None:
    plain = model_fingerprint(llama())
    for config in (hf_reg.SorsaConfig(**SETTINGS), hf_reg.BALoraConfig(**SETTINGS)):
        adapted = hf_reg.get_regularized_peft_model(llama(), config)
        assert model_fingerprint(adapted, below_adapter=True) == plain != model_fingerprint(adapted)
    saving = lora(modules_to_save=["embed_tokens"])
    assert model_fingerprint(saving, below_adapter=True) == plain
    assert model_fingerprint(llama(1)) != plain != model_fingerprint(llama().bfloat16())


def test_a_resumed_run_reads_the_cache(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "optim": "adamw_torch", "beta": 0.3, "eta": 0.5}
    whole, _ = counted(tmp_path, llama(2), **settings)
    whole.train()
    first, _ = counted(tmp_path, llama(2), save_strategy="steps", save_steps=2, **settings)
    first.train()
    second, forwards = counted(tmp_path, llama(2), **settings)
    assert forwards == 0
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    _, forwards = counted(tmp_path, second.model, **settings)
    assert forwards > 0, "a trained model is another reference"


def test_the_columns_of_trl(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    for rows in (PLAIN, TURNS):
        args = trl.DPOConfig(
            str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=28, disable_tqdm=True,
            per_device_train_batch_size=len(rows), precompute_ref_log_probs=True,
        )  # fmt: skip
        data = datasets.Dataset.from_list(rows)
        theirs = trl.DPOTrainer(llama(2), llama(3), args, train_dataset=data, processing_class=tokenizer())
        wanted = {(*row["prompt_ids"], -1, *row["chosen_ids"]): row for row in theirs.train_dataset}
        ours = trainer(tmp_path, llama(2), rows, ref_model=llama(3), precompute_reference=True, max_length=28)
        assert len(ours.train_dataset) >= len(rows) - 1
        for pair in ours.train_dataset:
            row = wanted[(*pair["prompt_ids"], -1, *pair["chosen_ids"])]
            for name in REFERENCE:
                assert pair[name] == pytest.approx(row[name], rel=1e-5)


# what is refused


def break_file(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        start, _ = header["pairs" if how == "other pairs" else REFERENCE[0]]["data_offsets"]
        start += 8 + size
        path.write_bytes(content[:start] + b"\xff" * 4 + content[start + 4 :])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "cannot be read"), ("empty", "cannot be read"),
        ("other pairs", "holds 8 log-probs that do not belong to the 8 pairs that its name stands for"),
        ("not finite", "holds 8 log-probs that do not belong"),
    ],
)  # fmt: skip
def test_a_file_that_is_broken(how: str, message: str, tmp_path: Path) -> None:
    counted(tmp_path)
    (path,) = files(tmp_path)
    break_file(path, how)
    with pytest.raises(ValueError, match=message) as error:
        counted(tmp_path)
    assert f"{path}" in str(error.value) and str(error.value).endswith("Delete this file.")
    path.unlink()
    assert counted(tmp_path)[1] > 0


def test_a_write_that_stops_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(precomputed, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        counted(tmp_path)
    assert files(tmp_path) == []


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing"), Path("/proc")):
        model = lora()
        forwards = Forwards(model)
        with pytest.raises(ValueError, match="is no folder that can be written to .* Give another one"):
            trainer(tmp_path, model, reference_cache=str(folder))
        assert forwards.count == 0


def test_two_references(tmp_path: Path) -> None:
    rows = [{**row, **dict.fromkeys(REFERENCE, -1.0)} for row in PLAIN]
    for settings in ({"precompute_reference": True}, {"reference_cache": str(tmp_path / "cache")}):
        with pytest.raises(ValueError, match="Two references: precompute_reference=True and the columns"):
            trainer(tmp_path, rows=rows, **settings)
        with pytest.raises(ValueError, match="eval_dataset has ref_chosen_logps and .* other data of this run"):
            trainer(tmp_path, eval_dataset=rows, **settings)


def test_a_collator_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data_collator is PreferenceCollator, which may make others of them"):
        RPOTrainer(
            lora(), arguments(tmp_path, precompute_reference=True), train_dataset=PLAIN, processing_class=tokenizer(),
            data_collator=PreferenceCollator(0),
        )  # fmt: skip


def test_a_reference_that_is_gone_already(tmp_path: Path) -> None:
    merged = lora(moved=0.1)
    merged.merge_adapter()
    for model in (lora(init_lora_weights="pissa"), merged):
        with pytest.raises(ValueError, match="is not the model that training starts from"):
            trainer(tmp_path, model, precompute_reference=True)


def test_patches(tmp_path: Path) -> None:
    """The reference has none, neither those of the trainer nor those that were there before."""
    for patches, model in (("tlm", llama(2)), (None, hf_reg.patch_model(llama(2), "tlm", rate=0.5).train())):
        made = trainer(tmp_path, model, precompute_reference=True, patches=patches)
        plain = trainer(tmp_path, llama(2), precompute_reference=True)
        assert torch.equal(columns(made.train_dataset), columns(plain.train_dataset))
        assert model.training or patches
    model = llama(2)
    forwards = Forwards(model)
    with pytest.raises(ValueError, match="head_mask acts in eval mode too, so the reference would carry it"):
        trainer(tmp_path, model, precompute_reference=True, patches={"head_mask": {"heads": {0: [1]}}})
    assert forwards.count == 0


def test_log_probs_that_are_not_finite(tmp_path: Path) -> None:
    model = llama()
    model.model.embed_tokens.weight.data[tokenizer().convert_tokens_to_ids("x")] = float("nan")
    rows = [PLAIN[0], {"prompt": "a", "chosen": "b", "rejected": "b"}, PLAIN[1], {**PLAIN[2], "rejected": "next x"}]
    with pytest.raises(ValueError, match=r"train_dataset, row 3: .* log-probs are -\d.* \(chosen\) and nan"):
        counted(tmp_path, lora(model), rows=rows)
    assert files(tmp_path) == []


def test_weights_that_are_not_there() -> None:
    model = lora()
    model.base_model.model.model.norm.to("meta")
    with pytest.raises(ValueError, match="norm.weight of PeftModelForCausalLM is a shard or a placeholder"):
        precomputed._check_whole(Reference(model))


def test_the_command_line_says_it(tmp_path: Path) -> None:
    line = f"--output_dir x --reference_cache {tmp_path} --use_cpu --bf16 False"
    (args,) = HfArgumentParser(RPOConfig).parse_args_into_dataclasses(line.split())
    assert args.precompute_reference and args.reference_cache == str(tmp_path)
    assert not arguments(tmp_path).precompute_reference


def test_a_bar_shows_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, precompute_reference=True, disable_tqdm=False, per_device_train_batch_size=3)
    said = capsys.readouterr().err
    assert "log-probs of train_dataset under the reference: 100%" in said and "3/3" in said
    trainer(tmp_path, precompute_reference=True, disable_tqdm=True)
    assert capsys.readouterr().err == ""


def test_penalties_that_number_examples(tmp_path: Path) -> None:
    class Numbered(LogitsPenalty):
        NAME, NEEDS = "numbered", frozenset({"logits", "example_ids"})

        def __call__(self, model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
            return outputs.logits.mean() * 0

    made = trainer(tmp_path, precompute_reference=True, penalties=[Numbered(weight=0.1)])
    assert {*REFERENCE, "example_ids"} <= set(made.train_dataset[0])
    made.train()


# two processes


def shared_run(folder: Path) -> dict[str, Any]:
    """One step on all pairs, and what the data hold then."""
    model = lora(moved=0.1)
    forwards = Forwards(model)
    made = trainer(
        folder, model, reference_cache=str(folder / "cache"), per_device_train_batch_size=8 // world(), beta=0.3,
        eta=0.5, eval_dataset=PLAIN[:5], per_device_eval_batch_size=2, train_sampling_strategy="sequential",
    )  # fmt: skip
    count = forwards.count
    made.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    tables = {"train": columns(made.train_dataset), "eval": columns(made.eval_dataset)}
    return {"weights": weights, "forwards": count, "said": str(made.reference), **tables}


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    launch("tests.preferences.test_reference_cache", str(tmp_path))
    alone = shared_run(tmp_path / "alone")
    for rank in range(2):
        first, second, errors = torch.load(tmp_path / f"rank{rank}.pt")
        for found in (first, second):
            torch.testing.assert_close(found["train"], alone["train"])
            torch.testing.assert_close(found["eval"], alone["eval"])
            for name, value in alone["weights"].items():
                torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-6)
        assert first["said"].endswith("0 pairs read, 13 computed)") and first["forwards"] > 0
        assert second["said"].endswith("13 pairs read, 0 computed)") and second["forwards"] == 0
        assert "have 2 different references or train_dataset. Load the same weights in each" in errors[0]
        assert "cannot be read" in errors[1]
    ours, other = (torch.load(tmp_path / f"rank{rank}.pt")[0] for rank in range(2))
    assert torch.equal(ours["train"], other["train"]) and torch.equal(ours["eval"], other["eval"])


def in_this_process(folder: Path, rank: int) -> None:
    results: list[Any] = [shared_run(folder), shared_run(folder)]
    errors = []
    for break_it in (False, True):
        if break_it and rank == 0:
            for path in files(folder):
                path.write_bytes(b"")
        torch.distributed.barrier()
        try:
            cache = str(folder / "cache")
            trainer(folder, lora(llama(0 if break_it else rank)), reference_cache=cache)
        except ValueError as error:
            errors.append(str(error))
    torch.save([*results, errors], folder / f"rank{rank}.pt")


if __name__ == "__main__":
    in_this_process(Path(sys.argv[1]), int(os.environ["RANK"]))
