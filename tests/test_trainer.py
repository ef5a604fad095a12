"""RegularizedTrainer on one process: what it leaves alone, what it logs, what it refuses, and other trainers."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, RegularizerMixin
from hf_reg.base import Penalty
from hf_reg.recipes import make_patches, make_penalties
from hf_reg.seams.attention import gates

from .distributed.heads import ROWS, WEIGHT, Spy, difference, make, rows, weight_penalty


def arguments(kind: type = RegularizedTrainingArguments, folder: Any = "unused", **settings: Any) -> Any:
    common: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    return kind(str(folder), **(common | settings))


def trainer(head: str = "classes/bert", cls: type = RegularizedTrainer, **settings: Any) -> Any:
    own = {key: settings.pop(key) for key in list(settings) if key in ("penalties", "patches", "teacher", "optimizers",
           "compute_loss_func", "model", "companions", "callbacks")}  # fmt: skip
    kind = RegularizedTrainingArguments if issubclass(cls, RegularizerMixin) else TrainingArguments
    own.setdefault("model", make(head))
    return cls(args=arguments(kind, **settings), train_dataset=rows(head), eval_dataset=rows(head), **own)


def logs(made: Any, key: str = "loss") -> list[dict[str, float]]:
    return [entry for entry in made.state.log_history if key in entry]


@pytest.mark.parametrize("head", ["classes/bert", "tokens/llama"])
@pytest.mark.parametrize("penalties", [None, {"l1": 0.0}])
def test_without_weight_it_is_the_plain_trainer(head: str, penalties: Any) -> None:
    plain, ours = trainer(head, Trainer), trainer(head, penalties=penalties)
    for one in (plain, ours):
        one.train()
    for (name, a), b in zip(plain.model.state_dict().items(), ours.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [entry["loss"] for entry in logs(plain)] == [entry["loss"] for entry in logs(ours)]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_terms_sum_to_the_logged_loss(accumulation: int, every: int) -> None:
    made = trainer(
        penalties={"weights": (WEIGHT, weight_penalty), "l1": 0.01, "spread": (0.1, lambda m, i, o: o.logits.var())},
        gradient_accumulation_steps=accumulation, per_device_train_batch_size=2, logging_steps=every,
    )  # fmt: skip
    made.train()
    assert len(logs(made)) == 4 // every
    for entry in logs(made):
        terms = [value for name, value in entry.items() if name.startswith("loss_")]
        assert len(terms) == 4 and sum(terms) == pytest.approx(entry["loss"], rel=1e-6)


def test_eval_loss_is_the_task_alone() -> None:
    made = trainer(penalties={"weights": (WEIGHT, weight_penalty), "spread": (2.0, lambda m, i, o: o.logits.var())})
    metrics = made.evaluate()
    model, batch = (
        made.model.eval(),
        {key: torch.stack([row[key] for row in rows("classes/bert")]) for key in rows("classes/bert")[0]},
    )
    with torch.no_grad():
        outputs = model(**batch)
    assert metrics["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-6)
    assert metrics["eval_loss_spread"] == pytest.approx(2 * outputs.logits.var().item(), rel=1e-5)
    assert metrics["eval_loss_weights"] == pytest.approx(WEIGHT * weight_penalty(model, None, None).item(), rel=1e-5)


def test_schedules_move_the_weight() -> None:
    class Ones(Penalty):
        NAME = "ones"

        def __call__(self, model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
            return torch.ones(())

    made = trainer(penalties=[Ones(weight=2.0, schedule="linear")])
    made.train()
    assert [entry["loss_ones"] for entry in logs(made)] == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_what_a_penalty_needs_is_asked_for_and_taken_away_again() -> None:
    seen: list[Any] = []

    class Looks(Penalty):
        NAME, NEEDS = "looks", frozenset({"hidden_states", "second_pass"})

        def __call__(self, model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
            seen.append((len(outputs.hidden_states), outputs.second_pass.logits.shape, inputs["labels"].shape))
            return outputs.hidden_states[-1].square().mean()

    made = trainer(penalties=[Looks()])
    made.train()
    assert seen[0] == (3, (4, 3), (4,))
    predicted = made.predict(rows("classes/bert"))
    assert predicted.predictions.shape == (ROWS, 3)  # no hidden states among the predictions


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_example_ids_name_the_example_whatever_the_order(kind: str) -> None:
    import datasets

    class Remembers(Penalty):
        NAME, NEEDS = "remembers", frozenset({"logits", "example_ids"})

        def __call__(self, model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
            for index, ids in zip(inputs["example_ids"].tolist(), inputs["input_ids"], strict=True):
                seen[index] = ids
            return outputs.logits.sum() * 0

    seen: dict[int, torch.Tensor] = {}
    data: Any = rows("classes/bert")
    if kind == "datasets":
        data = datasets.Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in data])
    made = RegularizedTrainer(
        model=make("classes/bert"), args=arguments(num_train_epochs=1), train_dataset=data, eval_dataset=data,
        penalties=[Remembers()],
    )  # fmt: skip
    made.train()
    assert "eval_loss" in made.evaluate()
    assert len(seen) == ROWS and all(
        torch.equal(seen[i], row["input_ids"]) for i, row in enumerate(rows("classes/bert"))
    )
    stream = datasets.Dataset.from_list([{"input_ids": [1]}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="is a stream whose examples have no number"):
        RegularizedTrainer(model=make("classes/bert"), args=arguments(), train_dataset=stream, penalties=[Remembers()])


def test_patches_and_penalties_as_text(tmp_path: Path) -> None:
    recipe = tmp_path / "penalties.yaml"
    recipe.write_text("l1: 0.01\nl2: {weight: 0.1, scope: '*query*'}\n")
    made = trainer(patches="{tlm: {rate: 0.2}, drophead: {p: 0.3}}", penalties=str(recipe))
    assert {gate.p for gate in gates(made.model)} == {0.2, 0.3}
    assert [(p.name, p.weight) for p in made.penalties] == [("l1", 0.01), ("l2", 0.1)]
    said = arguments(patches="tlm", penalties="l1: 0.5")
    assert said.patches == "tlm" and said.penalties == {"l1": 0.5}
    made = RegularizedTrainer(model=make("classes/bert"), args=said, train_dataset=rows("classes/bert"))
    assert next(iter(gates(made.model))).patch.name == "tlm" and made.penalties[0].weight == 0.5


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ("l2_ps", ValueError, "Unknown penalty 'l2_ps'. Did you mean 'l2_sp'?"),
        ({"l1": {"wieght": 1}}, TypeError, "l1 has no setting 'wieght'. Did you mean 'weight'?"),
        ({"l1": -1}, ValueError, "weight=-1 is out of range"),
        ({"mine": (1.0, lambda model: 0)}, TypeError, r"must take \(model, inputs, outputs\)"),
        ([{"l1": 1}, {"l1": 2}], ValueError, r"names of their own"),
        (3, TypeError, "expected a name, a Penalty, a list or a dict"),
        ("l1: [", ValueError, "Not a name and not YAML"),
        ("missing.yaml", ValueError, "is not there"),
    ],
)
def test_bad_penalties_are_refused_in_words(spec: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make_penalties(spec)


def test_a_value_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match="'mine' returned shape \\(4, 3\\); expected a tensor with one element"):
        trainer(penalties={"mine": lambda model, inputs, outputs: outputs.logits}).train()


def test_combinations_are_refused_and_leave_the_model_alone() -> None:
    model = make("classes/bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"optimizers": (optimizer, None)}, "optimizer_cls_and_kwargs"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "Reentrant"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": False}}, "preserve"),
        ({"compute_loss_func": lambda outputs, labels, **kwargs: outputs.loss}, "does not name num_items_in_batch"),
        ({"penalties": {"consistency": 1.0}}, "no adapter that could be switched off"),
        ({"penalties": {"confidence": 1.0}, "use_liger_kernel": True}, "returns no logits, which confidence needs"),
    ]  # fmt: skip
    for settings, text in cases:
        with pytest.raises(ValueError, match=text):
            trainer(model=model, **({"patches": "tlm", "penalties": {"l1": 0.1}} | settings))
        assert not list(gates(model)), settings


@pytest.mark.parametrize("where", ["task", "penalty"])
def test_a_step_that_is_not_finite_stops_by_name(where: str) -> None:
    def explodes(model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
        return outputs.logits.sum() * (math.nan if where == "penalty" and made.state.global_step == 2 else 0.0)

    made = trainer(penalties={"mine": explodes})
    if where == "task":
        with torch.no_grad():
            made.model.classifier.bias[0] = math.inf
    with pytest.raises(FloatingPointError, match="Step 3.*mine" if where == "penalty" else "Step 1.*task"):
        made.train()


def test_the_last_checkpoint_is_from_before_the_step_that_is_not_finite(tmp_path: Path) -> None:
    def explodes(model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
        if made.state.global_step == 2:
            kept.update({name: value.clone() for name, value in model.state_dict().items()})
        return outputs.logits.sum() * (math.nan if made.state.global_step == 3 else 0.0)

    kept: dict[str, torch.Tensor] = {}
    args = arguments(folder=tmp_path, save_strategy="steps", save_steps=2)
    made = RegularizedTrainer(
        model=make("classes/bert"), args=args, train_dataset=rows("classes/bert"), penalties={"mine": explodes}
    )
    with pytest.raises(FloatingPointError, match="Step 4"):
        made.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    saved = type(made.model).from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in kept.items())
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())


def test_a_step_that_is_not_finite_can_be_skipped() -> None:
    def explodes(model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
        weights.append(model.classifier.weight.detach().clone())
        return outputs.logits.sum() * (math.inf if made.state.global_step == 1 else 0.0)

    weights: list[torch.Tensor] = []
    made = trainer(penalties={"mine": explodes}, on_nonfinite="skip", weight_decay=0.1)
    made.train()
    moved = [not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False)]
    assert moved == [True, False, True] and logs(made)[-1]["skipped_steps"] == 1
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())


def test_every_model_of_a_search_is_patched_and_anchored() -> None:
    made = RegularizedTrainer(
        model_init=lambda: make("classes/bert"), args=arguments(max_steps=2), train_dataset=rows("classes/bert"),
        patches="tlm", penalties={"l2_sp": 1.0},
    )  # fmt: skip
    first = made.model
    for _ in range(2):
        made.train()
        assert list(gates(made.model)) and logs(made)[-2]["loss_l2_sp"] == pytest.approx(0, abs=1e-3)
    assert made.model is not first


def test_gradient_shares() -> None:
    made = trainer(penalties={"weights": (WEIGHT, weight_penalty)}, gradient_shares=True)
    made.train()
    for entry in logs(made):
        assert entry["share_task"] + entry["share_weights"] == pytest.approx(1, abs=1e-5)
        assert entry["share_weights"] > 0


def test_over_other_trainers(tmp_path: Path) -> None:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class Ours(RegularizerMixin, Seq2SeqTrainer): ...

    made = Ours(model=make("tokens/t5"), args=arguments(Seq2SeqTrainingArguments, tmp_path), patches="drophead",
                train_dataset=rows("tokens/t5"), penalties={"weights": (WEIGHT, weight_penalty)})  # fmt: skip
    made.train()
    assert logs(made)[0]["loss_weights"] > 0 and list(gates(made.model))


def test_teacher_is_the_model_without_its_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    seen: list[torch.Tensor] = []

    class Compares(Penalty):
        NAME, NEEDS = "compares", frozenset({"logits", "teacher"})

        def __call__(self, model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
            assert model.training and not outputs.teacher.logits.requires_grad
            seen.append(outputs.teacher.logits)
            return (outputs.logits - outputs.teacher.logits).square().mean()

    base = make("tokens/llama")
    batch = torch.stack([row["input_ids"] for row in rows("tokens/llama")])
    with torch.no_grad():
        wanted = base.eval()(batch).logits
    made = trainer(
        model=get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)),
        head="tokens/llama", penalties=[Compares()], patches="tlm", per_device_train_batch_size=ROWS, max_steps=3,
        learning_rate=0.1, train_sampling_strategy="sequential",
    )  # fmt: skip
    made.train()
    assert len(seen) == 3 and all(torch.allclose(one, wanted, atol=1e-6) for one in seen)
    assert logs(made)[-1]["loss_compares"] > 0
    other = make("tokens/llama")
    made = trainer(head="tokens/llama", penalties=[Compares()], teacher=other, max_steps=1)
    made.train()
    assert not other.training and not any(p.requires_grad for p in other.parameters())


def test_losses_and_budgets_of_adapters_are_driven() -> None:
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    from peft.tuners.lora.config import KasaConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kasa = get_peft_model(
            make("tokens/llama"), LoraConfig(r=2, target_modules=["q_proj"], kasa_config=KasaConfig())
        )
    made = trainer(model=kasa, head="tokens/llama")
    assert [penalty.name for penalty in made.penalties] == ["kasa"]
    made.train()
    assert "loss_kasa" in logs(made)[0]
    config = AdaLoraConfig(
        init_r=4,
        target_r=1,
        tinit=0,
        tfinal=1,
        deltaT=1,
        total_step=4,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
    )
    ada = get_peft_model(make("tokens/llama"), config)
    made = trainer(model=ada, head="tokens/llama", max_steps=4)
    made.train()
    assert ada.base_model.peft_config["default"].rank_pattern is not None
    assert [penalty.name for penalty in made.penalties] == ["adalora"]
    ada.eval()
    batch = {key: torch.stack([row[key] for row in rows("tokens/llama")]) for key in rows("tokens/llama")[0]}
    with torch.no_grad():
        hidden, task = ada(**batch).loss.item(), ada.get_base_model()(**batch).loss.item()  # PEFT adds it in eval too
    metrics = made.evaluate()
    assert metrics["eval_loss"] == pytest.approx(task, rel=1e-5)
    assert metrics["eval_loss_adalora"] == pytest.approx(hidden - task, rel=1e-4) and hidden - task > 0.1


def test_patch_specifications() -> None:
    from hf_reg.patches import DropHead

    assert [p.name for p in make_patches(["tlm", DropHead(p=0.1)])] == ["tlm", "drophead"]
    assert make_patches(None) == [] and make_patches({"tlm": None})[0].name == "tlm"
    with pytest.raises(TypeError, match="expected a name, a Patch, a list or a dict"):
        make_patches(3.5)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": 3 + i for i in range(60)}, "<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_over_the_trainers_of_trl(tmp_path: Path, kind: str) -> None:
    """Their loss is computed without logits: a penalty on the outputs must have a gradient all the same."""
    import datasets
    import trl
    from peft import LoraConfig, get_peft_model

    class Ours(RegularizerMixin, getattr(trl, f"{kind}Trainer")): ...  # type: ignore[misc]

    def spread(model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
        return outputs.logits.square().mean()

    words = [" ".join(f"w{(i + k) % 60}" for k in range(6)) for i in range(8)]
    columns = {"text": words} if kind == "SFT" else {"prompt": words, "chosen": words[::-1], "rejected": words}
    steps: list[dict[str, torch.Tensor]] = []
    for size, accumulation, weight in ((8, 1, 5.0), (2, 4, 5.0), (8, 1, 0.0)):
        spy = Spy()
        args = arguments(
            getattr(trl, f"{kind}Config"), tmp_path, max_steps=1, per_device_train_batch_size=size, max_grad_norm=0.0,
            gradient_accumulation_steps=accumulation, bf16=False,
        )  # fmt: skip
        torch.manual_seed(0)
        model = get_peft_model(make("tokens/llama"), LoraConfig(r=2, target_modules="all-linear"))
        made = Ours(
            model=model, args=args, train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer(),
            penalties={"spread": (weight, spread), "l2": 0.1}, patches={"drophead": {"p": 0.0}}, callbacks=[spy],
        )  # fmt: skip
        made.train()
        assert list(gates(made.model)) and (logs(made)[0].get("loss_spread", 0) > 0) == (weight > 0)
        steps += spy.steps
    assert difference(steps[1], steps[0]) < 1e-4
    assert difference(steps[2], steps[0]) > 1e-2, "the penalty on the outputs has no gradient"
