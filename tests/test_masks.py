"""Masks of every convention through `narrow`: the kinds, shapes and dtypes that models hand to the interface."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_reg import patch_model
from hf_reg.patches.tlm import TLM, TLMGate
from hf_reg.seams.attention import gates
from hf_reg.seams.masks import BLOCKED, narrow

from .architectures import build, forward
from .properties import same, without_dropout


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["none", "bool", "rows", "min", "inf", "bias"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    implementation=st.sampled_from(["sdpa", "eager"]),
    causal=st.booleans(),
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 4]),
    length=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_narrowed_masks(kind, dtype, implementation, causal, batch, heads, length, seed) -> None:
    """Nothing hidden comes back, kept values stay as they are, no row loses its last key, and the convention stays."""
    torch.manual_seed(seed)
    allowed = torch.ones(batch, 1, length, length, dtype=torch.bool)
    if kind != "none":
        lengths = torch.randint(1, length + 1, (batch, 1, 1, 1))
        allowed = (torch.arange(length) < lengths).expand(-1, -1, length, -1)
    if causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    if kind == "rows" and causal:
        return
    values = torch.randn(batch, heads, length, length, dtype=dtype) if kind == "bias" else torch.zeros((), dtype=dtype)
    low = float("-inf") if kind == "inf" else torch.finfo(dtype).min
    mask = {
        "none": None,
        "bool": allowed,
        "rows": allowed[:, :, :1],  # the same for every query, to be broadcast
        "min": values.masked_fill(~allowed, low),
        "inf": values.masked_fill(~allowed, low),
        "bias": values.masked_fill(~allowed, low),
    }[kind]
    query = torch.randn(batch, 4, length, 8, dtype=dtype)
    module = nn.Module()
    module.is_causal = causal  # type: ignore[assignment]
    if kind == "none" and implementation == "eager":
        allowed = torch.ones_like(allowed)  # eager without a mask restricts nothing
    gate = TLMGate(TLM(rate=0.5))
    given = None if mask is None else mask.clone()
    result = narrow(gate, implementation, module, query, query, mask, False, None, {})
    assert mask is None or torch.equal(mask, given), "the model's own mask was written to"
    if result is None:
        assert length == 1
        return
    if result.dtype == torch.bool:
        assert kind in ("bool", "rows") or implementation == "sdpa"
        visible = result
    else:
        assert result.dtype == dtype
        visible = result > BLOCKED
        if given is not None:
            kept = result.expand_as(visible)[visible]
            assert torch.equal(kept, given.expand_as(visible)[visible]), "a bias changed"
    allowed = allowed.expand_as(visible)
    assert not (visible & ~allowed).any()
    assert torch.equal(visible.any(-1), allowed.any(-1))


def test_thirty_steps_at_rate_zero_are_those_of_the_unpatched_model() -> None:
    """Parity: the same losses and the same weights, bit for bit, with the model's own dropout on."""
    results = []
    for patch in (False, True):
        tiny = build("bert")
        model = tiny.model.train()
        if patch:
            patch_model(model, [TLM(rate=0.3), "drophead"])
            for gate in gates(model):
                gate.p = 0.0
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(30):
            forward(model, tiny.inputs)[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    assert same(results[0], results[1])


def test_replaces_attention_dropout_only_while_it_is_on() -> None:
    tiny = build("bert")
    model = without_dropout(tiny.model).train()
    for module in model.modules():
        if type(module).__name__ == "BertSelfAttention":
            module.dropout.p = 0.5
    for replace, differs in ((True, False), (False, True)):
        patch_model(model, "tlm", rate=1e-9, replace_dropout=replace)  # on, but it never selects a token
        outputs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs.append(forward(model, tiny.inputs))
        assert same(*outputs) != differs
