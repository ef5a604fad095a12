"""torch.compile: one graph without breaks, at most two compilations over a whole schedule; flex attention."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hf_reg import patch_model, unpatch_model
from hf_reg.schedules import model_step

from .architectures import build
from .properties import lively, without_dropout


@pytest.mark.parametrize("patch", ["tlm", "drophead"])
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_one_graph_serves_a_schedule(model_type: str, patch: str) -> None:
    tiny = build(model_type)
    model = lively(without_dropout(tiny.model)).train()
    inputs = {**tiny.inputs} | ({} if model_type == "bert" else {"use_cache": False})
    eager = model(**inputs)[0]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**inputs)[0], eager, atol=1e-5)
    patch_model(compiled, patch, schedule="v_shape")  # noticed although the model has already been compiled and run
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    outputs = []
    for step in range(11):
        model_step(model, step, 10)
        outputs.append(compiled(**inputs)[0].detach())
    assert counter.frame_count <= 2
    assert torch.allclose(outputs[1], eager, atol=1e-5), "rate 0 at the turn of the V"
    assert not torch.allclose(outputs[10], outputs[1], atol=1e-5)
    unpatch_model(model)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(**inputs)[0], eager, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["both", "siblings", "self"])
@pytest.mark.parametrize("model_type", ["bert", "llama", "mistral"])
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)
def test_flex_attention_equals_sdpa(model_type: str, mode: str) -> None:
    """Forward only: torch has no backward of flex attention on a CPU."""
    model = lively(without_dropout(build(model_type).model)).train()
    ids, mask = torch.randint(8, 90, (2, 160)), torch.ones(2, 160, dtype=torch.long)
    mask[1, 100:] = 0
    outputs = {}
    with torch.no_grad():
        for implementation in ("sdpa", "flex_attention"):
            model.set_attn_implementation(implementation)
            patch_model(model, "tlm", rate=0.3, mode=mode)
            torch.manual_seed(0)
            outputs[implementation] = model(input_ids=ids, attention_mask=mask)[0][mask.bool()]
    assert torch.allclose(outputs["sdpa"], outputs["flex_attention"], atol=1e-4)
