"""Each figure shows what it says: its artists are read back and compared with what really happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5Model,
    Trainer,
    TrainingArguments,
)

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments, patch_model, report
from hf_reg.adapters.drift import spectrum_drift
from hf_reg.patches import TLM
from hf_reg.report import style
from hf_reg.schedules import SCHEDULES, model_step, on_plateau, v_shape
from hf_reg.seams.attention import gates

from ..distributed.heads import make, rows
from ..preferences.models import lora
from ..preferences.models import trainer as preference_trainer
from ..preferences.words import PLAIN, tokenizer


WORDS = "the quick brown fox jumps over the lazy dog".split()


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
        for line in axes.get_lines()
    }


def bert(**settings: Any) -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    return BertModel(BertConfig(vocab_size=64, **{**sizes, **none, **settings}))


# the mask of TLM


def cells(figure: Any) -> torch.Tensor:
    return torch.as_tensor(figure.axes[0].images[0].get_array().filled())


def attended(model: Any, padding: int, seed: int) -> torch.Tensor:
    """(T, T) bool: which tokens the only layer of a model attends to in a training step."""
    mask = torch.ones(1, len(WORDS), dtype=torch.long)
    mask[0, len(WORDS) - padding :] = 0
    ids = torch.arange(len(WORDS))[None] + 5
    torch.manual_seed(seed)
    return model.train()(ids, attention_mask=mask, output_attentions=True).attentions[0][0, 0] > 0


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("mode", ["both", "siblings", "self"])
def test_mask_is_that_of_a_training_step(mode: str, padding: int) -> None:
    patch = TLM(rate=0.4, mode=mode)
    for seed in range(3):
        found = cells(report.tlm_mask(WORDS, patch, padding=padding, seed=seed))
        assert torch.equal(found == 0, attended(patch_model(bert(), patch), padding, seed))
        assert (found == 1).sum() == padding * len(WORDS)


def test_mask_of_a_decoder_is_causal() -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        attn_implementation="eager",
    )  # fmt: skip
    model = patch_model(LlamaForCausalLM(config), "tlm", rate=0.4)
    found = cells(report.tlm_mask(WORDS, {"rate": 0.4}, causal=True, seed=1))
    assert torch.equal(found == 0, attended(model, 0, 1))
    assert torch.equal(found == 1, torch.ones_like(found, dtype=torch.bool).triu(1))


def test_mask_names_what_was_selected() -> None:
    figure = report.tlm_mask(WORDS, {"rate": 0.5}, seed=3)
    axes, found = figure.axes[0], cells(figure)
    bold = {text.get_text(): text.get_color() for text in axes.get_yticklabels() if text.get_fontweight() == "bold"}
    siblings = [word for word, row in zip(WORDS, found, strict=True) if (row == 3).any()]
    own = [word for word, row in zip(WORDS, found, strict=True) if (row == 4).any()]
    assert siblings and own and sorted(bold) == sorted(siblings + own)
    assert {bold[word] for word in siblings}.isdisjoint({bold[word] for word in own})
    assert f"{len(bold)} of {len(WORDS)} tokens selected" in figure.get_suptitle()
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(said) == len(found.unique()) == 4  # nothing was invisible from the start


def test_mask_of_a_text_spares_tokens_and_leaves_the_stream_alone() -> None:
    made = tokenizer()
    before = torch.get_rng_state()
    figure = report.tlm_mask("a red$ ball$", {"rate": 0.9, "spare_token_ids": (1,)}, tokenizer=made, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    labels = [text.get_text().replace("\\", "") for text in figure.axes[0].get_yticklabels()]
    assert labels == made.convert_ids_to_tokens(made("a red$ ball$")["input_ids"])
    assert cells(figure)[0, 0] == 0 and figure.axes[0].get_yticklabels()[0].get_fontweight() == "normal"


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        ("a text", {}, "needs a tokenizer="),
        ([], {}, "0 tokens; expected 1 to 64"),
        (["x"] * 65, {}, "65 tokens; expected 1 to 64"),
        (["x"], {"padding": 1}, "padding=1 of 1 tokens"),
        (["x"], {"patch": "drophead"}, "token-level masking; got the patch 'drophead'"),
        (["x"], {"patch": {"spare_token_ids": (1,)}}, "spare_token_ids are ids"),
    ],
)
def test_mask_refusals(tokens: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.tlm_mask(tokens, **settings)


# DropHead


def test_head_drops_are_those_of_the_gates() -> None:
    model = patch_model(bert(num_hidden_layers=3, num_attention_heads=4), "drophead", p=0.4)
    model.train()
    figure = report.head_drops(model, steps=50, step=7, seed=5)
    torch.manual_seed(5)
    drawn = torch.stack([
        torch.stack([gate.scales(1, 4, torch.device("cpu"))[0] == 0 for gate in gates(model)]) for _ in range(50)
    ])  # fmt: skip
    left, right = figure.axes[:2]
    assert torch.allclose(torch.as_tensor(left.images[0].get_array().filled()), drawn.float().mean(0))
    assert torch.equal(torch.as_tensor(right.images[0].get_array().filled()) == 1, drawn[7])
    assert f"step 7: {int(drawn[7].sum())} of 12 heads" in right.get_title() and "p = 0.4" in left.get_title()
    assert [text.get_text() for text in left.get_yticklabels()] == ["0", "1", "2"]


def test_head_drops_follow_a_schedule_and_leave_the_model() -> None:
    model = patch_model(bert(num_attention_heads=4), "drophead", p=0.5, schedule=v_shape(warmup=0.5))
    model_step(model, 3, 4)
    (gate,) = gates(model)
    before = gate.factor, torch.get_rng_state()
    figure = report.head_drops(model, steps=40, step=20)  # where the schedule is at 0
    assert gate.factor == before[0] != 0 and torch.equal(torch.get_rng_state(), before[1])
    left, right = figure.axes[:2]
    assert not right.images[0].get_array().any() and left.images[0].get_array().any()
    assert "schedule v_shape" in left.get_title()


def test_head_drops_of_groups_and_of_an_encoder_and_decoder() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=9,
    )  # fmt: skip
    model = patch_model(LlamaForCausalLM(config), "drophead", granularity="batch", skip=True, p=0.5)
    one = report.head_drops(model, steps=30).axes[0].images[0].get_array()
    assert (one[0, :4] == one[0, 0]).all() and one.any()  # a group is dropped as a whole
    t5 = T5Model(T5Config(d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2, vocab_size=9))
    axes = report.head_drops(patch_model(t5, "drophead"), steps=2).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["encoder 0", "decoder 0", "decoder 0 cross"]


def test_head_drops_refusals() -> None:
    with pytest.raises(ValueError, match='patch_model\\(model, "drophead"\\) first'):
        report.head_drops(bert())
    with pytest.raises(ValueError, match="step=9 of steps=5"):
        report.head_drops(patch_model(bert(), "drophead"), steps=5, step=9)


# schedules


def test_schedule_curves() -> None:
    losses = [(4, 1.0), (6, 2.0)]
    figure = report.schedule_curves([*SCHEDULES, v_shape(warmup=0.3)], 10, rate=0.2, evaluations=losses)
    found = lines(figure.axes[0])
    assert [name for name in found if not name.startswith("_")] == [*SCHEDULES, "v_shape(warmup=0.3)"]
    for name, cls in SCHEDULES.items():
        seen = [[loss for at, loss in losses if at <= step] for step in range(11)]
        assert found[name][1] == [0.2 * cls()(step, 10, seen[step]) for step in range(11)]
    assert found["on_plateau"][1][3:8] == [0.2, *[0.2 * 0.9] * 2, *[pytest.approx(0.2 * 0.9 * 1.5)] * 2]
    (curve,) = lines(report.schedule_curves({"mine": on_plateau()}, 5).axes[0]).values()
    assert curve[1] == [1.0] * 6
    with pytest.raises(ValueError, match="0 schedules"):
        report.schedule_curves([])
    with pytest.raises(ValueError, match="Unknown schedule 'typo'"):
        report.schedule_curves("typo")


# losses and penalties over the steps of real runs


def run(folder: Path, kind: Any = RegularizedTrainer, **settings: Any) -> Any:
    data = rows("classes/bert", 16)
    own = {name: settings.pop(name) for name in ("penalties",) if name in settings}
    cls = RegularizedTrainingArguments if kind is RegularizedTrainer else TrainingArguments
    args = cls(
        str(folder), max_steps=6, per_device_train_batch_size=8, eval_strategy="steps", eval_steps=2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    made = kind(model=make("classes/bert"), args=args, train_dataset=data[:8], eval_dataset=data[8:], **own)
    made.train()
    return made


def test_curves_of_a_run(tmp_path: Path) -> None:
    made = run(tmp_path, penalties={"l2": 0.1})
    logs = made.state.log_history
    found = lines(report.loss_curves(made).axes[0])
    assert found["training"] == (
        [1, 2, 3, 4, 5, 6],
        [log["loss_task"] for log in logs if "loss_task" in log],
    )
    held_out = [log["eval_loss"] for log in logs if "eval_loss" in log]
    assert found["held out"] == ([2, 4, 6], held_out)
    (star,) = [name for name in found if name.startswith("lowest")]
    assert found[star][1] == [min(held_out)]
    plain = run(tmp_path, Trainer)  # its last log has train_loss, the mean of the run
    assert lines(report.loss_curves(plain).axes[0])["training"][1] == [
        log["loss"] for log in plain.state.log_history if "loss" in log
    ]


def test_curves_of_seeds_are_means() -> None:
    one = [{"step": 1, "train_loss": 1.0, "eval_loss": 2.0}, {"step": 2, "train_loss": 0.5, "eval_loss": 1.0}]
    other = [{"step": 1, "train_loss": 3.0, "eval_loss": 4.0}]
    left, right = report.loss_curves({"a": [one, other], "b": one}, reference="b").axes
    assert lines(left)["a"] == ([1, 2], [2.0, 0.5]) and lines(right)["a"] == ([1, 2], [3.0, 1.0])
    assert lines(right)["b"][1] == [2.0, 1.0]
    assert {line.get_label(): to_hex(line.get_color()) for line in left.get_lines()}["b"] == style.BLACK
    low, high = right.get_ylim()
    assert low == 0 and high > 3 and left.get_ylim() == right.get_ylim()
    (axes,) = report.loss_curves([{"step": 1, "loss": 1.0}, {"step": 2, "loss": -1.0}]).axes
    assert axes.get_ylim()[0] < -1


def test_histories_that_cannot_be_drawn() -> None:
    with pytest.raises(
        ValueError, match="loss_curves.*'train_loss' or 'loss_task' or 'loss'.*2 logs have 'f1', 'step'"
    ):
        report.loss_curves([{"step": 1, "f1": 0.5}, {"step": 2, "f1": 0.5}])
    with pytest.raises(ValueError, match=r"loss_curves \(b\): .*no key"):
        report.loss_curves({"a": [{"step": 1, "loss": 1.0}], "b": []})
    with pytest.raises(TypeError, match="Expected a Trainer.*got str"):
        report.loss_curves("trainer_state.json")
    with pytest.raises(ValueError, match="training logs have 'loss', 'step'; expected 'loss_task'"):
        report.penalty_shares([{"step": 1, "loss": 1.0}])
    with pytest.raises(
        ValueError, match="preference_curves: No 'logps/chosen' or 'eval_logps/chosen'.*'loss', 'step'"
    ):
        report.preference_curves([{"step": 1, "loss": 1.0}])


def test_penalty_shares(tmp_path: Path) -> None:
    made = run(tmp_path, penalties={"l2": 0.1, "confidence": 0.2}, gradient_shares=True)
    logs = [log for log in made.state.log_history if "loss_task" in log]
    loss, gradient = report.penalty_shares(made).axes
    names = ["task", "confidence", "l2"]
    assert [area.get_label().split(" (")[0] for area in loss.collections] == names
    below = torch.zeros(len(logs))
    for name, area in zip(names, loss.collections, strict=True):
        total = torch.tensor([sum(abs(log[f"loss_{one}"]) for one in names) for log in logs])
        above = below + torch.tensor([abs(log[f"loss_{name}"]) for log in logs]) / total
        edge = torch.as_tensor(area.get_paths()[0].vertices)
        for step, low, high in zip(range(1, 7), below, above, strict=True):
            heights = edge[edge[:, 0] == step, 1]
            assert float(heights.min()) == pytest.approx(float(low), abs=1e-5)
            assert float(heights.max()) == pytest.approx(float(high), abs=1e-5)
        below = above
    assert torch.allclose(below, torch.ones(len(logs)))
    assert lines(gradient)["l2"][1] == [log["share_l2"] for log in logs]


def test_penalty_shares_of_a_preference_run_do_not_count_its_loss_twice(tmp_path: Path) -> None:
    made = preference_trainer(tmp_path, lora(moved=0.1), max_steps=2, penalties={"l2": 0.1})
    made.train()
    assert "loss_dpo" in made.state.log_history[0]
    (axes,) = report.penalty_shares(made).axes
    assert [area.get_label().split(" (")[0] for area in axes.collections] == ["task", "l2"]


def test_preference_curves(tmp_path: Path) -> None:
    made = preference_trainer(
        tmp_path, max_steps=4, eval_dataset=PLAIN[:4], eval_strategy="steps", eval_steps=2, learning_rate=0.1
    )
    made.train()
    logs = made.state.log_history
    logps, rewards, loss, accuracy = report.preference_curves(made).axes
    for axes, key, label in (
        (logps, "logps/chosen", "chosen"), (logps, "logps/rejected", "rejected"),
        (rewards, "rewards/margins", "margin"),
        (loss, "loss_dpo", "preference (DPO)"), (loss, "loss_sft", "likelihood (SFT)"),
        (accuracy, "rewards/accuracies", "accuracy"),
    ):  # fmt: skip
        assert lines(axes)[label] == ([1, 2, 3, 4], [log[key] for log in logs if key in log])
        held = [log[f"eval_{key}"] for log in logs if f"eval_{key}" in log]
        assert lines(axes)[f"{label}, held out"] == ([2, 4], held)
    some = [{key: value for key, value in log.items() if "logps" in key or key == "step"} for log in logs]
    assert sum(axes.axison for axes in report.preference_curves(some).axes) == 1


# calibration and spectra


def bins(*rows: tuple[float, int, float, float]) -> list[dict[str, float]]:
    return [
        {"low": low, "high": low + 0.1, "count": count, "confidence": sure, "accuracy": right}
        for low, count, sure, right in rows
    ]


def test_reliability() -> None:
    made = bins((0.5, 30, 0.55, 0.5), (0.6, 0, 0.0, 0.0), (0.9, 10, 0.95, 0.75))
    assert report.calibration_error(made) == pytest.approx(0.75 * 0.05 + 0.25 * 0.2)
    top, counts = report.reliability(made).axes
    assert top.get_title() == "ECE 0.087" or top.get_title() == "ECE 0.088"
    assert [(bar.get_x(), bar.get_height()) for bar in top.patches] == [(0.5, 0.5), (0.9, 0.75)]
    assert lines(top)["at its mean confidence"] == ([0.55, 0.95], [0.5, 0.75])
    assert [bar.get_height() for bar in counts.patches] == [30, 10]
    both = report.reliability({"a": made, "b": bins((0.9, 5, 0.9, 0.9))})
    assert [axes.get_title() for axes in both.axes[:2]] == [f"a\n{top.get_title()}", "b\nECE 0.000"]


def test_pooled_bins_are_those_of_all_predictions() -> None:
    pooled = report.pool_bins([bins((0.5, 30, 0.5, 0.4)), bins((0.5, 10, 0.58, 0.8), (0.6, 4, 0.6, 1.0))])
    assert [one["count"] for one in pooled] == [40, 4]
    assert (pooled[0]["confidence"], pooled[0]["accuracy"]) == (pytest.approx(0.52), pytest.approx(0.5))
    with pytest.raises(ValueError, match="Bin 0 has no 'low'; it has 'count'"):
        report.pool_bins([[{"count": 1}]])
    with pytest.raises(ValueError, match="hold no prediction"):
        report.reliability(bins((0.5, 0, 0, 0)))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=30
    )
    return LlamaForCausalLM(config)


def test_singular_values() -> None:
    base, tuned = llama(), llama()
    for i, name in enumerate(("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"), 2):
        tuned.get_submodule(name).weight.data *= i
    figure = report.singular_values(base, tuned, most=2)
    first, second = figure.axes
    assert "2 of 15 layers" in figure.get_suptitle()
    assert "q_proj" in first.get_title() and "up_proj" in second.get_title()  # the model's order
    own = torch.linalg.svdvals(base.model.layers[0].self_attn.q_proj.weight.detach())
    assert torch.allclose(torch.tensor(lines(first)["before"][1]), own, atol=1e-5)
    assert torch.allclose(torch.tensor(lines(first)["after"][1]), 3 * own, atol=1e-5)
    row = next(row for row in spectrum_drift(base, tuned).rows if row.name.endswith("0.self_attn.q_proj"))
    assert f"{row.values:.2g}" in first.get_title() and f"{row.vectors:.2g}" in first.get_title()
    with pytest.raises(ValueError, match="most=0"):
        report.singular_values(base, tuned, most=0)


def test_singular_values_of_an_adapter() -> None:
    model = lora(moved=0.3)
    (axes,) = report.singular_values(None, model, target_modules=["layers.1.self_attn.q_proj"]).axes
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.allclose(torch.tensor(lines(axes)["after"][1]), torch.linalg.svdvals(merged.detach()), atol=1e-4)
    assert lines(axes)["before"][1] != lines(axes)["after"][1]


# all of them


def contrast(colour: str) -> float:
    """Against white (WCAG)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 1.05 / (0.05 + sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))


def test_looks_are_all_different_and_legible() -> None:
    found = style.looks([f"m{i}" for i in range(12)], "m3")
    assert len({(one["color"], one["marker"], str(one["linestyle"])) for one in found.values()}) == 12
    assert len({one["marker"] for one in found.values()}) >= 10 and found["m3"]["color"] == style.BLACK
    assert all(contrast(colour) > 4.5 for colour in ("#8a5f00", "#8e3b6d", style.GREY, "#1a1a1a"))


def test_labels_are_no_formulas_and_never_left_out() -> None:
    figure = report.schedule_curves({"$x^$": "linear", "_private": "cosine", "many words " * 9: "v_shape"}, 5)
    style.picture(figure, "png", 40)  # the first is a formula that cannot be read
    said = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert said[:2] == [r"\$x^\$", "_private"] and said[2].endswith("…") and len(said[2]) < 50


def test_figures_take_nothing_from_the_user_and_leave_nothing() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    own = report.schedule_curves("linear", 5)
    with matplotlib.rc_context({"font.size": 30, "text.color": "white", "xtick.direction": "in"}):
        other = report.schedule_curves("linear", 5)
        changed = style.picture(other, "svg")
        assert matplotlib.rcParams["font.size"] == 30
    assert changed == style.picture(own, "svg") and dict(matplotlib.rcParams) == before
    assert b"<dc:date>" not in changed


def test_imports_are_light_and_a_missing_package_is_named() -> None:
    code = """
import sys
import hf_reg
assert "hf_reg.report" not in sys.modules
import hf_reg.report as report
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = None
try:
    report.schedule_curves("linear")
except ImportError as error:
    print(error)
"""
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said == 'Figures need matplotlib: run `pip install "hf_reg[report]"`.\n'


def test_no_module_hides_a_function() -> None:
    modules = {path.stem for path in Path(report.__file__).parent.glob("*.py")}
    assert not modules & set(report.__all__) and "pyplot" not in "".join(
        path.read_text() for path in Path(report.__file__).parent.glob("*.py")
    )


def test_fonts_with_other_letters_stand_behind_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ["Comic Neue", "WenQuanYi Micro Hei", "Noto Sans CJK SC", "DejaVu Sans"]
    monkeypatch.setattr("matplotlib.font_manager.get_font_names", lambda: installed)
    style._fonts.cache_clear()
    try:
        (axes,) = report.tlm_mask(["a", "red", "ball"], {"rate": 0.3}).axes
    finally:
        style._fonts.cache_clear()
    expected = ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Micro Hei"]
    assert axes.get_xticklabels()[0].get_fontfamily() == expected
