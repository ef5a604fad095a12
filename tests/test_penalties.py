"""Penalties: each function against slow loops in float64 written from METHODS.md, each class on tiny models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from torch import nn
from torch.autograd import gradcheck

from hf_reg import penalties as P
from hf_reg.base import Penalty
from hf_reg.penalties.answers import shifts_labels
from hf_reg.penalties.spectrum import EXACT


D = torch.float64
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=30, num_labels=3, initializer_range=0.5))


def llama(groups: int = 2) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=groups, vocab_size=30))


def gpt2() -> nn.Module:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = hf.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=30, initializer_range=0.5, **ends)
    return hf.GPT2LMHeadModel(config)


def lora(model: nn.Module) -> nn.Module:
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    return model


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def entropy(p: torch.Tensor) -> float:
    return -sum(a * math.log(a) for a in p.tolist())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def pick(logits: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The rows that count, one by one."""
    rows = logits.reshape(-1, logits.shape[-1])
    return list(rows) if mask is None else [row for row, counts in zip(rows, mask.flatten(), strict=True) if counts]


def slow_pairs(s: torch.Tensor, t: torch.Tensor, mask: torch.Tensor | None, measure: Callable[..., float]) -> float:
    pairs = zip(pick(s, mask), pick(t, mask), strict=True)
    return mean([measure(a.softmax(0), b.softmax(0)) for a, b in pairs])


def slow_covariance(z: torch.Tensor) -> float:
    n, d = z.shape
    c = [[sum((z[:, i] - z[:, i].mean()) * (z[:, j] - z[:, j].mean())).item() / (n - 1) for i in range(d)]
         for j in range(d)]  # fmt: skip
    return sum(c[i][j] ** 2 for i in range(d) for j in range(d) if i != j) / d


def slow_entropy(z: torch.Tensor, k: int, mask: torch.Tensor | None) -> float:
    return -mean([entropy(row.sort(descending=True).values[:k].softmax(0)) for row in pick(z, mask)])


def slow_normalized_mse(s: torch.Tensor, t: torch.Tensor, mask: torch.Tensor | None) -> float:
    found = []
    for a, b in zip(pick(s, mask), pick(t, mask), strict=True):
        long, other = (math.sqrt(sum(x * x for x in row.tolist())) for row in (a, b))
        found.append(mean([(x / long - y / other) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)]))
    return mean(found)


def slow_truncated(s: torch.Tensor, t: torch.Tensor, k: int, temperature: float, mask: torch.Tensor | None) -> float:
    found = []
    for a, b in zip(pick(s, mask), pick(t, mask), strict=True):
        q, p = (row.div(temperature).softmax(0) for row in (a, b))
        top = p.argsort(descending=True)[:k].tolist()
        value = sum(p[j].item() * math.log(p[j] / q[j]) for j in top)
        if k < len(p):
            others = [j for j in range(len(p)) if j not in top]
            rest_p, rest_q = p[others].sum().item(), q[others].sum().item()
            value += rest_p * math.log(rest_p / rest_q)
        found.append(value)
    return temperature**2 * mean(found)


def slow_distance(m: torch.Tensor) -> float:
    short = m if m.shape[0] <= m.shape[1] else m.T
    return math.hypot(*[x.dot(y).item() - (i == j) for i, x in enumerate(short) for j, y in enumerate(short)])


def slow_share(z: torch.Tensor, norm: str) -> float:
    s = sorted((max(x, 0) ** 0.5 for x in torch.linalg.eigvalsh(z @ z.T).tolist()), reverse=True)
    return -(s[0] + s[1]) / (sum(s) if norm == "nuclear" else math.hypot(*s))


MASK = torch.tensor([[True, False, True], [False, False, True]])
TOKENS, OTHERS = rand(2, 3, 7), rand(2, 3, 7, seed=1)
WIDE = 40  # columns that send 4 rows through the Gram matrix

CASES = {  # function of logits, inputs, the slow value
    "consistency": (
        lambda z: P.consistency(z, OTHERS[0]), TOKENS[0],
        4 * slow_pairs(TOKENS[0] / 2, OTHERS[0] / 2, None, lambda s, t: kl(t, s)),
    ),
    "consistency, T=0.5": (
        lambda z: P.consistency(z, OTHERS, temperature=0.5, mask=MASK), TOKENS,
        0.25 * slow_pairs(TOKENS / 0.5, OTHERS / 0.5, MASK, lambda s, t: kl(t, s)),
    ),
    "symmetric_kl": (
        lambda z: P.symmetric_kl(z, OTHERS, mask=MASK), TOKENS,
        slow_pairs(TOKENS, OTHERS, MASK, lambda a, b: (kl(a, b) + kl(b, a)) / 2),
    ),
    "consistency v5, nlg": (
        lambda z: P.consistency(z, OTHERS, temperature=1.0, mask=MASK), TOKENS,
        slow_pairs(TOKENS, OTHERS, MASK, lambda s, t: kl(t, s)),
    ),
    "consistency v5, nlu": (
        lambda z: P.normalized_mse(z, OTHERS[0]), TOKENS[0], slow_normalized_mse(TOKENS[0], OTHERS[0], None)
    ),
    "normalized_mse, masked": (
        lambda z: P.normalized_mse(z, OTHERS, mask=MASK), TOKENS, slow_normalized_mse(TOKENS, OTHERS, MASK)
    ),
    **{
        f"truncated_consistency {k}": (
            lambda z, k=k: P.truncated_consistency(
                z, P.top_logits(OTHERS[MASK], k, 2.0), temperature=2.0, mask=MASK
            ), TOKENS, slow_truncated(TOKENS, OTHERS, k, 2.0, MASK),
        )
        for k in (1, 3, 7)
    },
    "covariance": (P.covariance, rand(5, 4), slow_covariance(rand(5, 4))),
    "covariance, fewer rows": (P.covariance, rand(3, 6), slow_covariance(rand(3, 6))),
    "diversity nlu": (P.diversity, rand(5, 4), slow_covariance(rand(5, 4))),
    "diversity nlu, masked": (
        lambda z: P.diversity(z, mask=MASK[0]), rand(3, 4), slow_covariance(rand(3, 4)[[0, 2]])
    ),
    "diversity nlg": (lambda z: P.diversity(z, top_k=3, mask=MASK), TOKENS, slow_entropy(TOKENS, 3, MASK)),
    "diversity nlg, all": (P.diversity, TOKENS, slow_entropy(TOKENS, 7, None)),
    "confidence": (lambda z: P.confidence(z, mask=MASK), TOKENS, slow_entropy(TOKENS, 7, MASK)),
    "frobenius_product": (
        lambda u: P.frobenius_product(u, rand(6, 2, seed=1).to(u.dtype)), rand(5, 2),
        (rand(5, 2) @ rand(6, 2, seed=1).T).square().sum().item() / 2,
    ),
    **{
        f"orthonormality {shape} {power}": (
            lambda m, power=power: P.orthonormality(m, squared=power == 2), rand(*shape),
            slow_distance(rand(*shape)) ** power,
        )
        for shape in [(3, 6), (6, 3)] for power in [1, 2]
    },
    **{
        f"svd {norm} {shape}": (
            lambda z, norm=norm: P.svd_concentration(z, k=2, norm=norm), rand(*shape), slow_share(rand(*shape), norm)
        )
        for shape in [(4, 6), (6, 4), (4, WIDE), (WIDE, 4)] for norm in ["nuclear", "frobenius"]
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_slow_loop_and_its_gradient(case: str) -> None:
    function, inputs, expected = CASES[case]
    value = function(inputs)
    assert value.dtype == D and value.shape == ()
    assert value.item() == pytest.approx(expected, rel=1e-7)
    assert gradcheck(function, inputs.clone().requires_grad_(), eps=1e-6, atol=1e-6)
    half = function(inputs.bfloat16().requires_grad_())  # the other logits stay float64
    assert half.isfinite() and half.dtype in (torch.float32, D) and half.item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing(case: str) -> None:
    function, inputs, _ = CASES[case]
    inputs, results = inputs.float(), []
    for autocast in (False, True):
        leaf = inputs.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = function(leaf)
        value.backward()
        results.append((value.double(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


DEGENERATE = {
    "zero": torch.zeros(4, 6), "constant": torch.ones(4, 6), "one row": rand(1, 6), "identity": torch.eye(4, 6),
    "rank one, wide": rand(4, 1) @ rand(1, 60), "zero, wide": torch.zeros(4, 60), "no row": torch.zeros(0, 6),
    "far apart": torch.tensor([[0.0, 1e4], [1e4, 0.0]]), "forbidden class": torch.tensor([[0.0, -math.inf, 1.0]] * 4),
}  # fmt: skip
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float32, D: D}
FUNCTIONS = {
    "consistency": lambda z: P.consistency(z, z.roll(1, 0)),
    "normalized_mse": lambda z: P.normalized_mse(z, z.roll(1, 0)),
    "truncated_consistency": lambda z: P.truncated_consistency(
        z, P.top_logits(z.detach().roll(1, 0).to(WIDER[z.dtype]), 2, 2.0)
    ),
    "diversity": lambda z: P.diversity(z, top_k=2),
    "confidence": P.confidence,
    "symmetric_kl": lambda z: P.symmetric_kl(z, z.roll(1, 0).detach()),
    "covariance": P.covariance,
    "nuclear": lambda z: P.svd_concentration(z, k=2),
    "frobenius": lambda z: P.svd_concentration(z, k=2, norm="frobenius"),
    "orthonormality": P.orthonormality,
}


OF_MATRICES = {"covariance", "nuclear", "frobenius", "orthonormality", "normalized_mse"}  # -inf has no value there
FINITE = [(f, kind) for f in FUNCTIONS for kind in DEGENERATE if kind != "forbidden class" or f not in OF_MATRICES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, D])
@pytest.mark.parametrize(("name", "kind"), FINITE)
def test_degenerate_inputs_have_finite_gradients(name: str, kind: str, dtype: torch.dtype) -> None:
    leaf = DEGENERATE[kind].detach().to(dtype, copy=True).requires_grad_()
    value = FUNCTIONS[name](leaf)
    value.backward()
    assert value.isfinite() and leaf.grad.isfinite().all() and leaf.grad.dtype == dtype
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    if kind == "no row" or (name in ("nuclear", "frobenius") and kind.startswith("zero")):
        assert value == 0 and not leaf.grad.any()


def test_anchors_of_the_methods() -> None:
    z, near = rand(6, 4), torch.linalg.qr(rand(8, 3)).Q.mT.float().requires_grad_()
    assert P.consistency(z, z) == 0
    assert P.svd_concentration(rand(6, 2) @ rand(2, 5), k=2) == pytest.approx(-1)  # rank k
    assert P.svd_concentration((rand(8, 1) @ rand(1, 80)).float(), k=1) == pytest.approx(
        -1, abs=1e-6
    )  # by Gram matrix
    assert P.svd_concentration(z, k=3, norm="frobenius") >= -(3**0.5)
    assert P.covariance(torch.linalg.qr(rand(6, 5) - rand(6, 5).mean(0)).Q) < 1e-30  # uncorrelated
    P.orthonormality(near).backward()
    assert near.grad.norm() == pytest.approx(2, rel=0.01)  # rounding noise has gradient norm 2
    exact = torch.eye(3, 8, requires_grad=True)
    P.orthonormality(exact).backward()
    assert not exact.grad.any()
    teacher = z.clone().requires_grad_()
    assert not P.consistency(z.clone().requires_grad_(), teacher).backward() and teacher.grad is None


def test_randomized_svd_is_close_repeatable_and_draws_no_random_number() -> None:
    z = rand(EXACT + 44, 12) @ torch.diag(0.6 ** torch.arange(12.0, dtype=D)) @ rand(12, 500, seed=1)
    z = (z + 0.001 * rand(*z.shape, seed=2)).requires_grad_()
    state = torch.get_rng_state()
    value = P.svd_concentration(z, k=4, norm="frobenius")
    assert torch.equal(state, torch.get_rng_state()) and value == P.svd_concentration(z, k=4, norm="frobenius")
    slow = -torch.linalg.svdvals(z)[:4].sum() / torch.linalg.svdvals(z).square().sum().sqrt()
    torch.testing.assert_close(value, slow, rtol=1e-5, atol=0)
    ours, theirs = torch.autograd.grad(value, z)[0], torch.autograd.grad(slow, z)[0]
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_empty_mask_gives_zero_and_masked_rows_do_not_matter() -> None:
    names = ("consistency, T=0.5", "diversity nlg", "confidence", "symmetric_kl", "normalized_mse, masked",
             "truncated_consistency 3")  # fmt: skip
    for name in names:
        function, z, expected = CASES[name]
        spoiled = torch.where(MASK[..., None], z, math.nan).requires_grad_()
        value = function(spoiled)
        value.backward()
        assert value.item() == pytest.approx(expected) and spoiled.grad.isfinite().all()
    empty = torch.zeros(2, 3, dtype=torch.bool)
    calls = (
        P.diversity, P.confidence, lambda z, mask: P.consistency(z, OTHERS, mask=mask),
        lambda z, mask: P.normalized_mse(z, OTHERS, mask=mask),
        lambda z, mask: P.truncated_consistency(z, P.top_logits(OTHERS[mask], 2, 2.0), mask=mask),
    )  # fmt: skip
    for call in calls:
        leaf = TOKENS.clone().requires_grad_()
        value = call(leaf, mask=empty)
        value.backward()
        assert value == 0 and not leaf.grad.any()


def test_answer_positions_are_those_of_the_task_loss() -> None:
    """The gradient of the task loss names the positions that count, for each kind of model."""
    labels = torch.tensor([[-100, 5, 6, -100, 7], [-100, -100, -100, 8, 9]])
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 30, "decoder_attention_heads": 2,
             "encoder_attention_heads": 2, "decoder_ffn_dim": 8, "encoder_ffn_dim": 8}  # fmt: skip
    models = [
        (llama(), True), (gpt2(), True), (lora(llama()), True),
        (hf.BertForMaskedLM(hf.BertConfig(**SMALL, vocab_size=30)), False),
        (hf.BartForConditionalGeneration(hf.BartConfig(**small)), False),
        (hf.BartForCausalLM(hf.BartConfig(**small)), False),
    ]  # fmt: skip
    for model, shift in models:
        assert shifts_labels(model) is shift, type(model)
        outputs = model(input_ids=labels.clamp(min=0), labels=labels)
        grad = torch.autograd.grad(outputs.loss, outputs.logits)[0]
        mask = P.answer_mask(model, {"labels": labels}, outputs.logits)
        assert torch.equal(mask, grad.abs().sum(-1) > 0), type(model)
        assert torch.equal(P.answer_mask(model, {"labels": labels}, outputs.logits, shift=False), labels != -100)
    attended = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])  # padded left, padded right
    logits = torch.zeros(2, 5, 30)
    expected = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    assert torch.equal(P.answer_mask(llama(), {"attention_mask": attended}, logits), expected)
    assert torch.equal(P.answer_mask(bert(), {"attention_mask": attended}, logits), attended.bool())
    assert P.answer_mask(bert(), {}, logits).all() and P.answer_mask(bert(), {}, logits[0]) is None


def answer(logits: torch.Tensor, **more: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=logits, **{key: SimpleNamespace(logits=value) for key, value in more.items()})


def test_classes_on_logits() -> None:
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    mask = torch.tensor([[True, True, False], [False, True, False]])
    outputs = answer(TOKENS, teacher=OTHERS, second_pass=OTHERS)
    expected = {
        "consistency": P.consistency(TOKENS, OTHERS, mask=mask),
        "diversity": P.diversity(TOKENS, top_k=7, mask=mask),  # K = 20 of 7
        "covariance": P.covariance(TOKENS[mask]),
        "svd_concentration": P.svd_concentration(TOKENS[mask], k=10, norm="frobenius"),
        "r_drop": P.symmetric_kl(TOKENS, OTHERS, mask=mask),
        "confidence": P.confidence(TOKENS, mask=mask),
    }
    for name, value in expected.items():
        torch.testing.assert_close(P.PENALTIES[name]()(llama(), {"labels": labels}, outputs), value)
    rows = answer(rand(8, 7))
    assert P.Diversity()(bert(), {}, rows) == P.covariance(rows.logits)
    assert P.SvdConcentration()(bert(), {}, rows) == P.svd_concentration(rows.logits, k=5)
    with pytest.warns(UserWarning, match="5 largest of at most 3 singular values .* gradient 0"):
        P.SvdConcentration()(bert(), {}, answer(rand(8, 3)))
    assert [(p.name, p.weight, p.strength(1, 2)) for p in P.ba_lora("nlu")] == [
        ("consistency", 0.15, pytest.approx(0.0825)), ("diversity", 0.03, 0.03), ("svd_concentration", 0.03, 0.03)
    ]  # fmt: skip


def test_ba_lora_of_both_versions() -> None:
    def settings(made: list[P.LogitsPenalty]) -> list[tuple]:
        first, second, third = made
        return [(p.name, p.weight) for p in made] + [
            (first.temperature, first.form), second.top_k, (third.k, third.norm),
            [p.strength(10, 100) / p.weight for p in made],
        ]  # fmt: skip

    names = ("consistency", "diversity", "svd_concentration")
    late = [pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(0.1 * math.pi))), 0, 0]
    for task, lambdas in (("nlg", (0.025, 0.005, 0.005)), ("nlu", (0.15, 0.03, 0.03))):
        assert settings(P.ba_lora(task)) == [*zip(names, lambdas, strict=True), (2.0, "kl"), 20, (None, None), late]
        form = "kl" if task == "nlg" else "mse"
        old = [*zip(names, (1e-4, 3e-4, 1e-4), strict=True), (1.0, form), None, (3, "nuclear"), [1, 1, 1]]
        assert settings(P.ba_lora(task, version="v5")) == old
    own = settings(P.ba_lora(lambdas=(1, 2, 0), temperature=3.0, top_k=4, k=6)[:2] + P.ba_lora(k=6)[2:])
    assert own[:2] == [("consistency", 1), ("diversity", 2)] and own[3:6] == [(3.0, "kl"), 4, (6, None)]


def test_terms_of_v5_on_outputs() -> None:
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    mask = torch.tensor([[True, True, False], [False, True, False]])
    outputs = answer(TOKENS, teacher=OTHERS)
    with pytest.warns(UserWarning, match="3 largest of at most 3"):
        values = [p(llama(), {"labels": labels}, outputs).item() for p in P.ba_lora(version="v5")]
    wanted = [
        slow_pairs(TOKENS, OTHERS, mask, lambda s, t: kl(t, s)), slow_entropy(TOKENS, 7, mask),
        -1.0,  # of three rows, the three largest are all
    ]  # fmt: skip
    assert values == pytest.approx(wanted)
    z, w = rand(8, 5), rand(8, 5, seed=1)
    values = [p(bert(), {}, answer(z, teacher=w)).item() for p in P.ba_lora("nlu", version="v5")]
    s = torch.linalg.eigvalsh(z.T @ z).clamp(min=0).sqrt().flip(0)
    wanted = [slow_normalized_mse(z, w, None), slow_covariance(z), -(s[:3].sum() / s.sum()).item()]
    assert values == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"task": "nlx"}, "task='nlx' is not known; choose one of 'nlg', 'nlu'"),
        ({"version": "v6"}, "version='v6' is not known; choose one of 'iclr2026', 'v5'"),
        ({"lambdas": (1, 2)}, "expected three weights"),
        ({"lambdas": 0.1}, "expected three weights"),
        ({"lambdas": (1, -2, 0)}, "weight=-2 is out of range"),
        ({"temperature": 0}, "temperature=0 is out of range"),
        ({"top_k": 0}, "top_k=0 is out of range"),
        ({"k": 0}, "k=0 is out of range"),
        ({"task": "nlu", "top_k": 5}, "top_k=5 has no use in 'nlu'"),
        ({"task": "nlu", "version": "v5", "temperature": 2.0}, "temperature=2.0 has no use in 'nlu' of 'v5'"),
    ],
)
def test_ba_lora_refuses_in_words(settings: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        P.ba_lora(**settings)


def test_a_truncated_teacher_gives_a_lower_bound_and_wants_its_rows() -> None:
    z, teacher = rand(6, 30), rand(6, 30, seed=1)
    bounds = [P.truncated_consistency(z, P.top_logits(teacher, k, 2.0)).item() for k in (1, 4, 16, 29, 30, 99)]
    assert bounds == sorted(bounds)
    assert bounds[-2:] == pytest.approx([P.consistency(z, teacher).item()] * 2, rel=1e-9) and bounds[2] < bounds[3]
    with pytest.raises(ValueError, match="5 rows of the student count, but the teacher has 6"):
        P.truncated_consistency(z[:5], P.top_logits(teacher, 4, 2.0))
    with pytest.raises(ValueError, match="expected the same shape"):
        P.normalized_mse(z, teacher[:5])


def heads_slowly(model: nn.Module, heads: int, groups: int) -> dict[str, float]:
    found, attention = {"qk": 0.0, "ov": 0.0}, [layer.self_attn for layer in model.model.layers]
    for module in attention:
        q, k, v, o = (getattr(module, f"{x}_proj").weight for x in "qkvo")
        d = q.shape[0] // heads
        for h in range(heads):
            g = h // (heads // groups)
            query, out = q[h * d : (h + 1) * d], o[:, h * d : (h + 1) * d]
            key, value = k[g * d : (g + 1) * d], v[g * d : (g + 1) * d]
            found["qk"] += (query.T @ key).square().sum().item() / 2
            found["ov"] += (out @ value).square().sum().item() / 2
    return found


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_frobenius_decay_of_heads(groups: int) -> None:
    model = llama(groups)
    slow = heads_slowly(model, 4, groups)
    for kind in ("qk", "ov"):
        assert P.FrobeniusDecay(kind)(model, {}, None).item() == pytest.approx(slow[kind], rel=1e-5)
    first = P.FrobeniusDecay(("qk", "ov"), scope="*layers.0.*")(model, {}, None).item()
    assert 0 < first < sum(slow.values())


def test_frobenius_decay_finds_other_projections() -> None:
    model = bert()
    attention = [layer.attention for layer in model.bert.encoder.layer]
    pairs = [(a.output.dense.weight, a.self.value.weight) for a in attention]
    slow = sum((o[:, i : i + 4] @ v[i : i + 4]).square().sum() / 2 for o, v in pairs for i in range(0, 16, 4))
    torch.testing.assert_close(P.FrobeniusDecay("ov")(model, {}, None), slow)
    model = gpt2()
    parts = [(h.attn.c_attn.weight.T.split(16), h.attn.c_proj.weight.T) for h in model.transformer.h]
    qk = sum((q[i : i + 4].T @ k[i : i + 4]).square().sum() / 2 for (q, k, _), _ in parts for i in range(0, 16, 4))
    ov = sum((o[:, i : i + 4] @ v[i : i + 4]).square().sum() / 2 for (_, _, v), o in parts for i in range(0, 16, 4))
    torch.testing.assert_close(P.FrobeniusDecay(("qk", "ov"))(model, {}, None), qk + ov)


def test_penalties_on_adapters() -> None:
    model = lora(llama())
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    pairs = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in layers]
    slow = sum((2.0 * b @ a).square().sum() / 2 for a, b in pairs)  # scaling 6 / 3
    torch.testing.assert_close(P.FrobeniusDecay()(model, {}, None), slow)
    terms = [torch.linalg.norm((m.T if m.shape[0] > 3 else m) @ (m if m.shape[0] > 3 else m.T) - torch.eye(3))
             for pair in pairs for m in pair]  # fmt: skip
    torch.testing.assert_close(P.Orthonormality(scope="adapters")(model, {}, None), sum(terms))
    torch.testing.assert_close(P.Orthonormality(reduction="mean")(model, {}, None), sum(terms) / len(terms))


def test_norms() -> None:
    model = bert()
    flat = torch.cat([w.flatten() for w in model.parameters()])
    torch.testing.assert_close(P.L1()(model, {}, None), flat.abs().sum())
    torch.testing.assert_close(P.L2(reduction="mean")(model, {}, None), flat.square().mean() / 2)


def test_anchors_survive_a_resume() -> None:
    model = bert()
    fisher = {name: torch.rand_like(w) for name, w in model.named_parameters() if "classifier" not in name}
    start = {name: w.detach().clone() for name, w in model.named_parameters()}
    ours = [P.L2SP(alpha=0.5, beta=0.25), P.EWC(fisher)]
    for penalty in ours:
        penalty.prepare(model)
    assert ours[1](model, {}, None) == 0
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight)
    moved = dict(model.named_parameters())
    l2_sp = sum(0.125 * w.square().sum() if "classifier" in n else 0.25 * (w - start[n]).square().sum()
                for n, w in moved.items())  # fmt: skip
    ewc = sum((fisher[n] * (moved[n] - start[n]).square()).sum() / 2 for n in fisher)
    for penalty, expected in zip(ours, (l2_sp, ewc), strict=True):
        value = penalty(model, {}, None)
        torch.testing.assert_close(value, expected)
        resumed = copy.copy(penalty)
        resumed.__post_init__()
        resumed.prepare(model)  # at the moved weights, as in a resumed run
        resumed.load_state_dict(load(save(penalty.state_dict())))
        assert resumed(model, {}, None) == value


@pytest.mark.parametrize("empirical", [True, False])
def test_fisher_information(empirical: bool) -> None:
    model = bert().train()
    model.bert.pooler.eval()  # a mixed state
    model.classifier.bias.grad = kept = torch.ones(3)
    modes = [m.training for m in model.modules()]
    batch = {"input_ids": torch.randint(30, (6, 5)), "labels": torch.randint(3, (6,))}
    loader = [{k: v[:4] for k, v in batch.items()}, {k: v[4:] for k, v in batch.items()}]
    torch.manual_seed(1)
    fisher = P.fisher_information(model, loader, samples=5, empirical=empirical)
    assert [m.training for m in model.modules()] == modes and model.classifier.bias.grad is kept
    twin, slow = copy.deepcopy(model).eval(), torch.zeros(3)
    torch.manual_seed(1)
    for i in range(5):
        p = twin(batch["input_ids"][i : i + 1]).logits.softmax(-1).detach()
        label = batch["labels"][i : i + 1] if empirical else torch.multinomial(p, 1)[0]
        slow += (p[0] - nn.functional.one_hot(label[0], 3)).square() / 5  # of the bias of a softmax
    torch.testing.assert_close(fisher["classifier.bias"], slow)
    assert set(fisher) == {name for name, _ in model.named_parameters()}
    with pytest.raises(ValueError, match="gave no loss"):
        P.fisher_information(model, [{"input_ids": batch["input_ids"]}])
    assert [m.training for m in model.modules()] == modes


def test_registry() -> None:
    assert len(P.PENALTIES) == 12
    for name, cls in P.PENALTIES.items():
        assert issubclass(cls, Penalty) and cls.NAME == name == cls().name
        assert cls.ON_PARAMETERS != bool(cls.NEEDS)
    files = {path.rsplit(".", 1)[1] for path in __import__("sys").modules if path.startswith("hf_reg.penalties.")}
    assert not files & set(P.__all__)  # a submodule would hide the function


def decay(kind: str, model: nn.Module, **settings: object) -> object:
    return lambda: P.FrobeniusDecay(kind, **settings)(model, {}, None)


neox = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
LABELS = {"labels": torch.zeros(2, 4)}
ERRORS = {
    "temperature": (lambda: P.consistency(TOKENS, OTHERS, temperature=0), "give temperature > 0"),
    "shapes": (lambda: P.consistency(TOKENS, OTHERS[0]), "expected the same shape"),
    "two shapes": (lambda: P.symmetric_kl(TOKENS, OTHERS[0]), "expected the same shape"),
    "mask shape": (lambda: P.confidence(TOKENS, mask=MASK[0]), r"mask \(3,\) does not fit .* expected \(2, 3\)"),
    "rank": (lambda: P.confidence(TOKENS[0, 0]), r"expected float \(N, D\) or \(B, T, V\)"),
    "top_k": (lambda: P.diversity(TOKENS, top_k=8), "top_k=8 is out of range; give 1 <= top_k <= 7"),
    "covariance": (lambda: P.covariance(TOKENS), r"expected \(N, D\)"),
    "svd": (lambda: P.svd_concentration(TOKENS, k=1), r"expected \(N, D\)"),
    "k": (lambda: P.svd_concentration(TOKENS[0], k=0), "give k >= 1"),
    "class k": (lambda: P.SvdConcentration(k=0), "give k >= 1"),
    "norm": (lambda: P.svd_concentration(TOKENS[0], k=1, norm="l1"), "choose one of 'nuclear', 'frobenius'"),
    "matrix": (lambda: P.orthonormality(TOKENS), "expected two dimensions"),
    "product": (lambda: P.frobenius_product(rand(3, 2), rand(3, 3)), r"expected \(m, r\) and \(n, r\)"),
    "logits": (lambda: P.Confidence()(bert(), {}, SimpleNamespace()), "outputs.logits is missing"),
    "teacher": (lambda: P.Consistency()(bert(), {}, answer(TOKENS)), "outputs.teacher.logits is missing"),
    "labels": (lambda: P.Confidence()(bert(), LABELS, answer(TOKENS)), r"labels \(2, 4\) do not fit logits"),
    "images": (lambda: P.Confidence()(bert(), {}, answer(rand(1, 2, 3, 4))), r"expected \(N, D\) of examples"),
    "no matrix": (lambda: P.Orthonormality(scope="*bias")(bert(), {}, None), "is a matrix; give patterns"),
    "no parameter": (lambda: P.L2(scope="nothing")(bert(), {}, None), "No trainable parameter"),
    "reduction": (lambda: P.L1(reduction="max"), "choose one of 'sum', 'mean'"),
    "task": (lambda: P.ba_lora("nlp"), "choose one of 'nlg', 'nlu'"),
    "kind": (lambda: P.FrobeniusDecay("vo"), "choose one of 'lora', 'qk', 'ov'"),
    "no kind": (lambda: P.FrobeniusDecay(()), "kind is empty"),
    "no adapter": (decay("lora", llama()), r"no 'lora' product of LlamaForCausalLM .* \(0 found\)"),
    "adapted": (decay("qk", lora(llama())), "self_attn .LlamaAttention. has no plain linear projections"),
    "fused": (
        decay("qk", hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**neox, vocab_size=30))),
        "attention .GPTNeoXAttention. has no plain linear projections",
    ),
    "not prepared": (lambda: P.L2SP()(bert(), {}, None), r"call prepare\(model\) before the first step"),
    "all new": (lambda: P.L2SP(new="*").prepare(bert()), "nothing is left to anchor"),
    "empty state": (lambda: P.L2SP().load_state_dict({}), r"holds no 'anchor.\*' tensor"),
    "no fisher": (lambda: P.EWC().prepare(bert()), "fisher is empty"),
    "strange fisher": (lambda: P.EWC({"x": rand(1)}).prepare(bert()), "names 'x', which BertFor"),
    "fisher shape": (lambda: P.EWC({"classifier.bias": rand(9)}).prepare(bert()), r"is \(9,\), expected \(3,\)"),
    "samples": (lambda: P.fisher_information(bert(), [], samples=0), "give samples >= 1"),
    "no example": (lambda: P.fisher_information(bert(), []), "gave no example"),
    "ragged": (lambda: P.fisher_information(bert(), [{"a": rand(2), "b": rand(3)}]), "use a batch size of 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case: str) -> None:
    call, text = ERRORS[case]
    with pytest.raises(ValueError, match=text):
        call()


def test_a_mask_of_integers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"pass mask.bool\(\)"):
        P.confidence(TOKENS, mask=MASK.long())
