"""The matrix: every patch on every named architecture under every property of properties.py."""

from __future__ import annotations

import pytest
import torch

from hf_reg.seams.attention import gates
from hf_reg.sites.attention import find_attention

from .properties import PATCHES, PROPERTIES, Case, build, check


ARCHITECTURES = [
    "bert", "roberta", "distilbert", "electra", "modernbert", "gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen3",
    "gemma3_text", "phi3", "mixtral", "t5", "bart", "marian", "vit", "clip", "whisper", "deberta-v2",
]  # fmt: skip
# Where a property cannot apply, and why. Anything else that reports "not applicable" is a failure: nothing goes
# vacuous here.
NOT_APPLICABLE: set[tuple[str, ...]] = {
    ("vit", "visibility_respected"), ("whisper", "visibility_respected"),  # no input_ids
    ("deberta-v2", "backends_agree"),  # own attention code: one backend
    ("mixtral", "visibility_respected", "ffn_dropout"),  # the order of the draws follows the routing
    ("mixtral", "visibility_respected", "nested_dropout"),
    *((model_type, "reloads_stock", "tensor_dropout") for model_type in ARCHITECTURES),  # adapters are saved apart
    ("mixtral", "visibility_respected", "standout"),
}  # fmt: skip


SAMPLE = ("bert", "llama", "t5", "mixtral")  # for every patch; `make test-all` tries all of ARCHITECTURES
CASES = [
    pytest.param(
        model_type, patch, marks=() if model_type in SAMPLE or patch in ("tlm", "drophead") else pytest.mark.slow
    )
    for model_type in ARCHITECTURES
    for patch in PATCHES
]


@pytest.mark.parametrize(("model_type", "patch"), CASES)
def test_every_property(model_type: str, patch: str) -> None:
    case = Case(model_type, patch, build(model_type))
    for name in PROPERTIES:
        reason = check(case, name)
        excused = (model_type, name) in NOT_APPLICABLE or (model_type, name, patch) in NOT_APPLICABLE
        assert (reason is not None) == excused, f"{name}: {reason}"


@pytest.mark.parametrize(
    "model_type", [name for name in ARCHITECTURES if name != "deberta-v2"]
)  # refused: test_patching.py
def test_skip_equals_multiplying_by_zero(model_type: str) -> None:
    """The sliced projections give the outputs and gradients of the same heads dropped after full projections."""
    tiny = build(model_type)
    if any(name.endswith("input_ids") for name in tiny.inputs) and model_type not in ("bert", "roberta", "electra"):
        tiny.inputs["use_cache"] = False
    case = Case(model_type, "drophead", tiny, {"p": 0.5, "skip": True, "granularity": "batch"})
    case.attach()
    case.run()  # the first step decides what can be sliced
    decided = {gate: gate.sliceable for gate in gates(case.model)}
    sliced = case.gradients(seed=1), case.run(seed=1)
    for gate in decided:
        gate.sliceable = False
    whole = case.gradients(seed=1), case.run(seed=1)
    assert sliced[0].keys() == whole[0].keys()
    for name in whole[0]:
        torch_close(sliced[0][name], whole[0][name], name)
    for a, b in zip(sliced[1], whole[1], strict=True):
        torch_close(a, b, "output")
    # phi3 splits its fused projection by numbers from the configuration, so only its attention is skipped
    assert set(decided.values()) == ({False} if model_type == "phi3" else {True})


def torch_close(a: torch.Tensor, b: torch.Tensor, name: str) -> None:
    scale = max(b.abs().max().item(), 1e-3)
    assert (a - b).abs().max().item() <= 1e-4 * scale, name


def test_the_matrix_is_complete() -> None:
    assert len(PROPERTIES) >= 11 and len(ARCHITECTURES) >= 20


def test_cross_attention_is_told_apart() -> None:
    for model_type in ("t5", "bart", "marian", "whisper"):
        sites = find_attention(build(model_type).model)
        cross = [site for site in sites if site.cross]
        assert len(cross) == 2 and all("decoder" in site.path for site in cross), model_type
        assert len(sites) == 6
        assert {(site.layer, site.layers) for site in sites} == {(0, 2), (1, 2)}
