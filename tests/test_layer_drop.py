"""Stochastic depth: rates by depth, one draw for a layer, multiplying and never skipping."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_reg import patch_model
from hf_reg.patches.layer_drop import LayerDropGate
from hf_reg.seams.attention import gates
from hf_reg.seams.layer_pass import LayerPass

from .architectures import build, forward
from .properties import PROPERTIES, Case, check, lively, reseed, without_dropout


def factors(model_type: str, runs: int = 1, **settings: object) -> dict[str, torch.Tensor]:
    """What each branch is multiplied with, (runs, B), by the path of its end."""
    tiny = build(model_type)
    model = patch_model(lively(without_dropout(tiny.model)).train(), "layer_drop", **settings)  # type: ignore[arg-type]
    found: dict[str, list[torch.Tensor]] = {}
    for gate in gates(model):
        assert isinstance(gate, LayerDropGate)

        def seen(states: torch.Tensor, gate: LayerDropGate = gate) -> torch.Tensor:
            ones = type(gate).transform(gate, torch.ones_like(states))
            examples = ones.view(2, -1)
            assert (examples == examples[:, :1]).all()
            found.setdefault(gate.path, []).append(examples[:, 0].detach())
            return states * ones

        gate.transform = seen  # type: ignore[method-assign]
    for seed in range(runs):
        reseed(seed)
        with torch.no_grad():
            forward(model, tiny.inputs)
    return {path: torch.stack(each) for path, each in found.items()}


@pytest.mark.parametrize("depth", ["linear", "uniform"])
def test_the_rate_of_a_layer_is_that_of_the_paper(depth: str) -> None:
    """p_l = p l / L for the l-th of L layers; what is kept is divided by 1 - p_l, so the mean is 1."""
    for path, each in factors("opt", 250, p=0.6, depth=depth).items():  # an FFN of OPT sees (B * T, C)
        number = int(path.split("layers.")[1][0]) + 1
        rate = 0.6 * number / 2 if depth == "linear" else 0.6
        kept = each != 0
        torch.testing.assert_close(each[kept], torch.full_like(each[kept], 1 / (1 - rate)))
        assert abs(kept.float().mean().item() - (1 - rate)) < 0.08, path
        assert (kept[:, 0] != kept[:, 1]).any()


def test_a_layer_has_one_draw_for_all_of_its_branches() -> None:
    found = factors("t5", 40, p=0.5, unit="layer", depth="uniform")
    decoder = [each for path, each in found.items() if "decoder.block.0." in path]
    assert len(decoder) == 3 and all(torch.equal(decoder[0], other) for other in decoder)
    others = [each for path, each in found.items() if "decoder.block.1." in path]
    assert not torch.equal(decoder[0], others[0])
    alone = [each for path, each in factors("t5", 40, p=0.5, depth="uniform").items() if "decoder.block.0." in path]
    assert not torch.equal(alone[0], alone[1])


def test_a_branch_that_asks_again_begins_another_pass() -> None:
    """Nothing tells when gradient checkpointing repeats a layer: what is left of the pass before must not be used."""
    shared, device = LayerPass(), torch.device("cpu")
    first = shared.draw("attention", 5, device)
    assert shared.draw("ffn", 5, device) is first
    again = shared.draw("attention", 5, device)
    assert not torch.equal(again, first) and shared.draw("ffn", 5, device) is again
    with pytest.raises(ValueError, match="other has 2 rows, attention, ffn before it 5"):
        shared.draw("other", 2, device)


def test_one_draw_for_the_batch_without_rescaling() -> None:
    for each in factors("llama", 60, p=0.5, granularity="batch", depth="uniform", rescale=False).values():
        assert set(each.unique().tolist()) == {0.0, 1.0} and torch.equal(each[:, 0], each[:, 1])


def test_a_dropped_layer_is_the_identity_and_keeps_its_gradients() -> None:
    tiny = build("llama")
    model = patch_model(tiny.model.train(), "layer_drop", p=0.999999, unit="layer", depth="uniform")
    states = model(**tiny.inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0], states[1])
    states[-1].sum().backward()
    inside = dict(model.layers.named_parameters())
    assert inside and all(parameter.grad is not None for parameter in inside.values())


@pytest.mark.parametrize("model_type", ["llama", "t5", "opt"])
def test_whole_layers_have_the_properties(model_type: str) -> None:
    """Gradient checkpointing repeats the forward of a layer without the layer's own hooks."""
    case = Case(model_type, "layer_drop", build(model_type), {"p": 0.5, "unit": "layer", "depth": "uniform"})
    for name in ("rate_zero_is_identity", "copies_are_independent", "checkpointing_repeats", "unpatch_restores"):
        assert name in PROPERTIES and check(case, name) is None, name


def test_copies_share_the_draw_of_a_layer_among_themselves() -> None:
    tiny = build("llama")
    model = patch_model(tiny.model.train(), "layer_drop", unit="layer")
    forward(model, tiny.inputs)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own, other = ([gate.layer_pass for gate in gates(one)] for one in (made, model))  # type: ignore[union-attr]
        assert own[0] is own[1] and own[2] is own[3] and own[0] is not own[2]
        assert not {id(one) for one in own} & {id(one) for one in other}


@pytest.mark.parametrize("unit", ["branch", "layer"])
def test_compiles_in_one_graph(unit: str) -> None:
    tiny = build("llama")
    tiny.inputs["use_cache"] = False
    model = patch_model(tiny.model.train(), "layer_drop", p=0.5, unit=unit)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = [compiled(**tiny.inputs)[0] for _ in range(8)]
    assert any(not torch.equal(outputs[0], other) for other in outputs)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for gate in gates(model):
        gate.factor = 0.5  # type: ignore[attr-defined]
    compiled(**tiny.inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


def test_errors() -> None:
    llama = build("llama").model
    for settings, said in [
        ({"p": 1.0}, "p=1.0 is out of range"), ({"unit": "block"}, "unit='block' is not known"),
        ({"granularity": "token"}, "granularity='token' is not known"), ({"depth": "exp"}, "depth='exp' is not known"),
        ({"rescale": "kept"}, "rescale='kept' is not known"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            patch_model(llama, "layer_drop", **settings)
    with pytest.raises(ValueError, match="attentions.0.out_lin stands in no layer that holds both"):
        patch_model(build("xlm").model, "layer_drop", unit="layer")
    with pytest.raises(ValueError, match=r"tokens before examples, \(T, B, C\); use granularity='batch'"):
        patch_model(build("fsmt").model, "layer_drop")
    with pytest.raises(ValueError, match="found nothing to patch in 'Linear'"):
        patch_model(nn.Linear(2, 2), "layer_drop")


@pytest.mark.parametrize("model_type", ["swin", "qwen2_vl_vision"])
def test_rows_that_are_no_examples_are_refused_by_name(model_type: str) -> None:
    """Windows of images, and images of a batch in one row."""
    tiny = build(model_type)
    patch_model(tiny.model.train(), "layer_drop")
    with pytest.raises(ValueError, match="cannot be told apart by examples; use granularity='batch'"):
        forward(tiny, tiny.inputs)
    patch_model(tiny.model, "layer_drop", granularity="batch")
    forward(tiny, tiny.inputs)
