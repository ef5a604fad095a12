"""patch_model, unpatch_model, patched and describe: effects, errors and wrappers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from hf_reg import describe, patch_model, patched, unpatch_model
from hf_reg.attaching import check_ran
from hf_reg.patches import TLM, DropHead, HeadMask
from hf_reg.seams.attention import SEAM, gates
from hf_reg.sites.attention import find_attention

from .architectures import build, forward
from .properties import lively, same, without_dropout


@pytest.fixture
def bert() -> nn.Module:
    return lively(without_dropout(build("bert").model)).train()


def places(model: nn.Module) -> dict[str, list[str]]:
    """Attention modules that carry gates: path -> names."""
    return {path: list(m._modules[SEAM]._modules) for path, m in model.named_modules() if SEAM in m._modules}


def fingerprint(model: nn.Module) -> list[Any]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [[name for name, _ in model.named_modules()], hooks, [repr(gate) for gate in gates(model)]]


@pytest.mark.parametrize(
    ("model_type", "patch", "settings", "error", "text"),
    [
        ("bert", "tml", {}, ValueError, r"Unknown patch 'tml'. Did you mean 'tlm'\? Known: tlm, drophead, head_mask"),
        ("bert", "tlm", {"rat": 0.1}, TypeError, r"tlm has no setting 'rat'. Did you mean 'rate'\?"),
        ("bert", "tlm", {"rate": 1.0}, ValueError, r"rate=1.0 is out of range; give 0 <= rate < 1"),
        ("bert", "tlm", {"rate": "0.1"}, TypeError, r"rate must be a number, got '0.1'"),
        (
            "bert",
            "tlm",
            {"mode": "all"},
            ValueError,
            r"mode='all' is not known; choose one of 'siblings', 'self', 'both'",
        ),
        ("bert", "tlm", {"layers": [5]}, ValueError, r"layers \[5\] do not exist. Layers of this model: model: 2"),
        (
            "bert",
            "tlm",
            {"layers": "x"},
            ValueError,
            r"layers='x' is no layer selection; give 'all', a slice such as '6:'",
        ),
        ("bert", "tlm", {"layers": "7:"}, ValueError, r"selects no attention module"),
        ("bert", "tlm", {"submodel": "vision"}, ValueError, r"no sub-model \['vision'\] to patch; this model has"),
        ("bert", "drophead", {"skip": True}, ValueError, r"needs granularity='batch'"),
        ("bert", "head_mask", {"heads": {0: [9]}}, ValueError, r"has 4 heads, but heads \[9\] are named"),
        ("bert", "head_mask", {}, ValueError, r"needs heads=\{layer: \[head, ...\]\}"),
        ("bert", "head_mask", {"heads": {0: [1]}, "schedule": "linear"}, ValueError, r"would do nothing"),
        ("bert", ["tlm", "tlm"], {}, ValueError, r"The same patch twice"),
        ("bert", ["tlm", "drophead"], {"rate": 0.1}, TypeError, r"give each its own, as Patch objects"),
        ("bert", TLM(), {"rate": 0.1}, TypeError, r"put them into the object"),
        ("bert", 3, {}, TypeError, r"A patch is a name or a Patch object, got int"),
        ("bert", [], {}, ValueError, r"No patch given"),
        ("resnet", "tlm", {}, ValueError, r"found nothing to patch in 'resnet': it has no attention module"),
        ("mamba", "tlm", {}, ValueError, r"'mamba': its token mixing has code of its own: 2 x MambaMixer"),
        ("deberta-v2", "drophead", {"skip": True, "granularity": "batch"}, ValueError, r"attention code of its own"),
        ("vit", "tlm", {"spare_token_ids": [1]}, ValueError, r"no model around .* takes input_ids"),
    ],
)
def test_errors_leave_the_model_as_it_was(model_type, patch, settings, error, text) -> None:
    model = build(model_type).model
    if model_type == "bert":
        patch_model(model, "drophead", p=0.3)
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        patch_model(model, patch, **settings)
    assert fingerprint(model) == before


def test_a_later_patch_that_fails_leaves_the_earlier_one_unattached(bert: nn.Module) -> None:
    before = fingerprint(bert)
    with pytest.raises(ValueError):
        patch_model(bert, ["tlm", HeadMask(heads={0: [99]})])
    assert fingerprint(bert) == before


def test_not_a_model_and_data_parallel() -> None:
    with pytest.raises(TypeError, match="Expected a model"):
        patch_model("bert", "tlm")  # type: ignore[type-var]
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        patch_model(nn.DataParallel(build("bert").model), "tlm")


def test_same_name_replaces_and_several_go_together(bert: nn.Module) -> None:
    assert patch_model(bert, ["tlm", "drophead"]) is bert
    patch_model(bert, "tlm", rate=0.3, layers=[-1])
    assert sorted(map(sorted, places(bert).values())) == [["drophead"], ["drophead", "tlm"]]
    assert {gate.p for gate in gates(bert)} == {0.2, 0.3}
    unpatch_model(bert, "tlm")
    assert list(places(bert).values()) == [["drophead"]] * 2
    with pytest.raises(ValueError, match="'tlm' is not on this model; it carries drophead"):
        unpatch_model(bert, "tlm")
    unpatch_model(unpatch_model(bert))
    assert not places(bert)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", {0, 1}), ("1:", {1}), (":1", {0}), ("-1:", {1}), ("::2", {0}), (0, {0}), (-1, {1}), ([0, -1], {0, 1})],
)  # fmt: skip
def test_layers(bert: nn.Module, layers, expected) -> None:
    patch_model(bert, "tlm", layers=layers)
    assert {site.layer for site in find_attention(bert) if site.path in places(bert)} == expected


def test_submodels() -> None:
    t5 = build("t5").model
    patch_model(t5, "tlm", submodel="decoder")
    assert len(places(t5)) == 2 and all(path.startswith("decoder") for path in places(t5))
    patch_model(t5, "drophead", attention="cross")
    assert sum("EncDec" in path for path in places(t5)) == 2
    clip = build("clip").model
    patch_model(clip, "drophead", submodel="vision")
    assert places(clip) and all("vision" in path for path in places(clip))


def test_partial_models_are_warned_about_by_name() -> None:
    model = build("siglip").model
    with pytest.warns(UserWarning, match="but not those with code of their own: 1 x MultiheadAttention"):
        patch_model(model, "drophead")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(build("llama").model, "drophead")
        with pytest.raises(UserWarning):  # turned into an error, it is one: the model is as it was
            patch_model(model, "tlm")
    assert {gate.patch.name for gate in gates(model)} == {"drophead"}


def test_attention_that_a_method_cannot_act_on_is_refused() -> None:
    single = AutoModel.from_config(AutoConfig.for_model("gpt2", n_layer=2, n_head=1, n_embd=8, vocab_size=64))
    with pytest.raises(ValueError, match="none of its 2 attention modules is attention of the chosen kind"):
        patch_model(single, "drophead")
    with pytest.raises(ValueError, match="none of its 1 attention modules is self-attention"):
        patch_model(build("sam3_mask_decoder").model, "tlm")
    assert not list(gates(single))


def test_patched_restores_also_after_an_exception(bert: nn.Module) -> None:
    patch_model(bert, "tlm", rate=0.2)
    before = fingerprint(bert)
    with pytest.raises(KeyError):
        with patched(bert, ["tlm", "drophead"]) as inside:
            assert inside is bert and {gate.patch.name for gate in gates(bert)} == {"tlm", "drophead"}
            raise KeyError
    assert fingerprint(bert) == before


def test_describe(bert: nn.Module) -> None:
    assert "No patch. 2 attention modules can be patched." in str(describe(bert))
    patch_model(bert, [TLM(rate=0.25), DropHead(layers="1:")])
    text = str(describe(bert))
    for part in ("tlm", "rate=0.25", "2 / 2", "1 / 2", "layers='1:'", "0.25 in training", "sdpa"):
        assert part in text, part
    assert "<pre" in describe(bert)._repr_html_()
    assert describe(bert.eval()).rows[0].now.startswith("off (eval)")


@pytest.mark.parametrize("order", ["before", "after"])
def test_peft(order: str) -> None:
    from peft import LoraConfig, get_peft_model

    model, config = build("llama").model, LoraConfig(target_modules=["q_proj", "v_proj"])
    model = get_peft_model(patch_model(model, "tlm") if order == "before" else model, config)
    patch_model(model, "tlm", rate=0.4)
    assert {gate.p for gate in gates(model)} == {0.4} and len(places(model)) == 2
    assert not any(SEAM in key for key in model.state_dict())
    assert not places(unpatch_model(model))


def test_prefix_tuning_selects_no_prefix() -> None:
    """Prefix keys stand before the queries: they stay visible to every row."""
    from peft import PrefixTuningConfig, get_peft_model

    for model_type in ("llama", "bert"):
        tiny = build(model_type)
        model = get_peft_model(
            tiny.model, PrefixTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION")
        ).train()
        patch_model(model, "tlm", rate=0.5)
        seen = []
        for gate in gates(model):
            draw = type(gate).draw

            def spy(self, view, real, draw=draw, seen=seen):
                selected, self_masked = draw(self, view, real)
                seen.append((view.offset, selected[:, : view.offset].any().item(), selected.any().item()))
                return selected, self_masked

            type(gate).draw = spy
            try:
                model(**tiny.inputs)
            finally:
                type(gate).draw = draw
            break
        assert seen and all(row == (3, False, True) for row in seen), (model_type, seen)


def test_disable_dropout_of_trl_reaches_every_gate(bert: nn.Module) -> None:
    from trl.trainer.utils import disable_dropout_in_model

    patch_model(bert, [TLM(rate=0.5), DropHead(p=0.5)])
    disable_dropout_in_model(bert)
    inputs = build("bert").inputs
    assert same(forward(bert, inputs), forward(bert, inputs))


def test_casts_and_copies_keep_the_rate(bert: nn.Module) -> None:
    patch_model(bert, "tlm", rate=0.3)
    for model in (bert.to(torch.bfloat16), copy.deepcopy(bert)):
        for gate in gates(model):
            assert gate.rate.dtype == torch.float32 and gate.rate.item() == pytest.approx(0.3)
    meta = patch_model(build("bert").model.to("meta"), "tlm", rate=0.3).to_empty(device="cpu")
    assert {round(gate.rate.item(), 6) for gate in gates(meta)} == {0.3}


def test_flash_refuses_tlm_and_takes_drophead(bert: nn.Module) -> None:
    for site in find_attention(bert):
        site.module.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes none. Use 'sdpa', 'eager' or 'flex_attention'"):
        patch_model(bert, "tlm")
    patch_model(bert, "drophead")
    assert len(places(bert)) == 2


def test_switching_to_flash_later_is_refused_when_it_runs(bert: nn.Module) -> None:
    patch_model(bert, "tlm")
    seam = next(module._modules[SEAM] for module in bert.modules() if SEAM in module._modules)
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="flash_attention_2"):
        seam.attend(None, "flash_attention_2", bert, x, x, x, None, None, {})


def test_spared_tokens_are_never_selected() -> None:
    for model_type in ("bert", "llama", "t5"):
        tiny = build(model_type)
        ids = tiny.inputs["input_ids"]
        ids[:, 0] = 5
        model = patch_model(
            without_dropout(tiny.model).train(), "tlm", rate=0.95, mode="siblings", spare_token_ids=(5,)
        )
        draws = []
        gate_class = type(next(iter(gates(model))))
        draw = gate_class.draw

        def spy(self, view, real, draw=draw, draws=draws):
            result = draw(self, view, real)
            if view.spared is not None:
                draws.append((result[0] & view.spared).any().item())
            return result

        gate_class.draw = spy
        try:
            forward(model, tiny.inputs)
        finally:
            gate_class.draw = draw
        assert draws and not any(draws)
        assert not any(m._forward_pre_hooks for m in unpatch_model(model).modules())


def test_head_mask_equals_zeroed_projection_columns(bert: nn.Module) -> None:
    """Masking a head is removing its columns from the output projection."""
    bert.eval()
    inputs = build("bert").inputs
    with torch.no_grad():
        plain = forward(bert, inputs)
        patch_model(bert, "head_mask", heads={0: [1, -1]})
        masked = forward(bert, inputs)
        unpatch_model(bert)
        dense = find_attention(bert)[0].path.rsplit(".", 1)[0] + ".output.dense"
        weight = bert.get_submodule(dense).weight
        size = weight.shape[1] // 4
        weight[:, size : 2 * size] = 0
        weight[:, 3 * size :] = 0
        expected = forward(bert, inputs)
    assert not same(plain, masked)
    for a, b in zip(masked, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_packed_sequences_stay_apart() -> None:
    """Two sequences in one row, told by position_ids: a change in the first leaves the second alone."""
    model = lively(without_dropout(build("llama").model)).train()
    ids = torch.randint(8, 90, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
    patch_model(model, "tlm", rate=0.5)
    changed = ids.clone()
    changed[0, 2] = 7
    outputs = []
    for row in (ids, changed):
        torch.manual_seed(1)
        outputs.append(model(input_ids=row, position_ids=positions, use_cache=False)[0])
    assert torch.equal(outputs[0][0, 6:], outputs[1][0, 6:]) and not torch.equal(outputs[0][0, :6], outputs[1][0, :6])


def test_check_ran(bert: nn.Module) -> None:
    patch_model(bert, "tlm")
    with pytest.raises(RuntimeError, match="none of its 2 patched modules ran their patch"):
        check_ran(bert)
    forward(bert, build("bert").inputs)
    check_ran(bert)
    pooled = build("cvt")  # its keys are pooled: TLM has nothing to hide, and must not pretend
    patch_model(pooled.model.train(), "tlm")
    forward(pooled.model, pooled.inputs)
    with pytest.raises(RuntimeError, match="none of its"):
        check_ran(pooled.model)


def test_trainer_drives_schedules_and_checks_the_first_step(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    from hf_reg.schedules import ScheduleCallback, linear

    tiny = build("bert")
    from transformers import BertForSequenceClassification

    model = patch_model(BertForSequenceClassification(tiny.model.config), DropHead(p=0.4, schedule=linear()))
    rows = [{"input_ids": tiny.inputs["input_ids"][0], "labels": torch.tensor(1)} for _ in range(8)]
    rates = []

    class Spy(ScheduleCallback):
        def on_step_end(self, args, state, control, **kwargs):
            rates.append(next(iter(gates(model))).rate.item())
            super().on_step_end(args, state, control, **kwargs)

    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Spy()]).train()
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
