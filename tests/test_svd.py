"""Decompositions of weights: against the exact SVD in float64, and everything that is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from hf_reg.adapters import svd, triplets
from hf_reg.adapters.svd import Factors, decompose, decompose_layers


SPECTRA: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "power law 0.5": lambda i: i**-0.5,
    "power law 1": lambda i: 1 / i,
    "power law 2": lambda i: i**-2,
    "steep": lambda i: torch.exp(-i / 10),
    "plateau": lambda i: torch.where(i <= 20, 1.0, 0.3) - 1e-3 * i / i.max(),
    "low rank": lambda i: torch.where(i <= 5, 1 / i, 0.0),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def known(out: int, inn: int, spectrum: str) -> torch.Tensor:
    """A weight with random singular vectors and the singular values of `spectrum`, in float64."""
    short = min(out, inn)
    u, v = (torch.linalg.qr(random(n, short, seed=n).double()).Q for n in (out, inn + 1))
    values = SPECTRA[spectrum](torch.arange(1, short + 1, dtype=torch.float64))
    return (u * values) @ v[:inn].mT


def exact(weight: torch.Tensor, rank: int) -> Factors:
    u, values, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return Factors(u[:, :rank], values[:rank], vh[:rank])


def product(factors: Factors) -> torch.Tensor:
    return (factors.left.double() * factors.values.double()) @ factors.right.double()


def overlap(one: Factors, two: Factors) -> float:
    """Of the principal subspaces: the mean squared cosine, of the left or the right ones, whichever is smaller."""
    rank = len(one.values)
    left = (one.left.double().mT @ two.left.double()).square().sum()
    right = (one.right.double() @ two.right.double().mT).square().sum()
    return float(torch.minimum(left, right)) / rank


def difference(found: Factors, weight: torch.Tensor) -> float:
    want = product(exact(weight, len(found.values)))
    return float((product(found) - want).norm() / want.norm())


def check_form(factors: Factors, weight: torch.Tensor, rank: int) -> None:
    assert factors.left.shape == (weight.shape[0], rank) and factors.right.shape == (rank, weight.shape[1])
    assert all(part.dtype == torch.float32 and part.is_contiguous() for part in vars(factors).values())
    eye = torch.eye(rank)
    torch.testing.assert_close(factors.left.mT @ factors.left, eye, atol=5e-6, rtol=0)
    torch.testing.assert_close(factors.right @ factors.right.mT, eye, atol=5e-6, rtol=0)
    assert (factors.values.diff() <= 0).all()
    assert (factors.right.gather(1, factors.right.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("exact_below", [1000, 0], ids=["whole", "krylov"])
@pytest.mark.parametrize("shape", [(400, 400), (600, 400), (400, 600)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_agrees_with_the_exact_svd(spectrum: str, shape: tuple[int, int], exact_below: int) -> None:
    weight = known(*shape, spectrum).float()
    rank = 20 if spectrum == "plateau" else 12
    factors = decompose(weight, rank, exact_below=exact_below)
    check_form(factors, weight, rank)
    assert difference(factors, weight) <= 1e-3
    if spectrum != "low rank":
        assert overlap(factors, exact(weight, rank)) >= 0.9999
        torch.testing.assert_close(factors.values.double(), exact(weight, rank).values, rtol=1e-3, atol=1e-5)
    else:
        assert overlap(decompose(weight, 5, exact_below=exact_below), exact(weight, 5)) >= 0.9999


def test_power_law_through_krylov_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = known(1024, 1024, "power law 0.5").float()
    monkeypatch.setattr(svd, "spectrum", None)  # the whole spectrum is not computed
    factors = decompose(weight, 32)
    assert overlap(factors, exact(weight, 32)) >= 0.9999 and difference(factors, weight) <= 1e-3


def test_new_rows_are_orthonormal_to_the_basis_however_little_is_new() -> None:
    basis = torch.linalg.qr(random(200, 20)).Q.mT
    rows = random(5, 20, seed=1) @ basis + 1e-5 * random(5, 200, seed=2)
    new = triplets._added(rows, basis)
    torch.testing.assert_close(new @ basis.mT, torch.zeros(5, 20), atol=5e-7, rtol=0)
    torch.testing.assert_close(new @ new.mT, torch.eye(5), atol=5e-4, rtol=0)
    assert torch.linalg.vector_norm(new, dim=1).max() <= 1 + 1e-6  # no energy that is not there
    every = torch.cat([basis, new])
    torch.testing.assert_close((rows @ every.mT) @ every, rows, atol=1e-5, rtol=1e-5)


def excess(factors: Factors, weight: torch.Tensor) -> float:
    """Of the error over the smallest one, in units of the energy of the whole weight: what `tolerance` bounds."""
    squares = torch.linalg.svdvals(weight.double()).square()
    error = (weight.double() - product(factors)).square().sum()
    return float((error - squares[len(factors.values) :].sum()) / squares.sum())


@pytest.mark.parametrize("tolerance", [1e-2, 2e-4, 1e-5])
@pytest.mark.parametrize("shape", [(600, 600), (900, 500)], ids=str)
def test_excess_is_within_the_tolerance_and_no_more_is_done(
    shape: tuple[int, int], tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd, "spectrum", None)
    monkeypatch.setattr(triplets, "FIRST", 3)
    for seed in range(3):
        weight = random(*shape, seed=seed)
        assert tolerance / 200 < excess(decompose(weight, 16, tolerance=tolerance, seed=seed), weight) <= tolerance


@pytest.mark.parametrize("exact_below", [1000, 0], ids=["whole", "krylov"])
def test_a_small_tolerance_gives_the_subspace_of_a_flat_spectrum(exact_below: int) -> None:
    weight = random(600, 500)
    strict = decompose(weight, 12, tolerance=1e-10, exact_below=exact_below)
    assert difference(strict, weight) <= 1e-4


@pytest.mark.parametrize("exact_below", [1000, 0], ids=["whole", "krylov"])
def test_a_small_tolerance_sees_what_the_gram_matrix_loses_in_fp32(exact_below: int) -> None:
    u, v = (torch.linalg.qr(random(500, 500, seed=seed).double()).Q for seed in (1, 2))
    weight = ((u * torch.exp(-torch.arange(500) / 3.0)) @ v.mT).float()  # the 32nd value: 3e-5 of the first
    strict = decompose(weight, 32, tolerance=1e-13, exact_below=exact_below)
    torch.testing.assert_close(strict.values.double(), exact(weight, 32).values, rtol=1e-3, atol=0)
    assert overlap(strict, exact(weight, 32)) >= 0.9999


def test_what_does_not_converge_in_time_goes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(800, 800)
    monkeypatch.setattr(triplets, "STEPS", 6)
    assert triplets.krylov(weight, 30, 1e-5, 0) is None
    assert difference(decompose(weight, 30, tolerance=1e-5), weight) <= 1e-3


@pytest.mark.parametrize("exact_below", [1000, 0], ids=["whole", "krylov"])
@pytest.mark.parametrize("weight", [torch.zeros(300, 240), torch.eye(300), torch.ones(240, 300)], ids=["0", "I", "1"])
def test_degenerate_weights(weight: torch.Tensor, exact_below: int) -> None:
    factors = decompose(weight, 4, exact_below=exact_below)
    torch.testing.assert_close(factors.left.mT @ factors.left, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(factors.right @ factors.right.mT, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(factors.values.double(), exact(weight, 4).values, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 20])
def test_extreme_ranks(rank: int) -> None:
    weight = random(20, 30)
    assert difference(decompose(weight, rank), weight) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("exact_below", [1000, 0], ids=["whole", "krylov"])
def test_every_float_dtype_is_decomposed_in_fp32(dtype: torch.dtype, exact_below: int) -> None:
    weight = known(500, 420, "power law 1").to(dtype)
    factors = decompose(weight, 8, exact_below=exact_below)
    check_form(factors, weight, 8)
    assert difference(factors, weight) <= 1e-3


def test_autocast_and_reduced_precision_do_not_reach_it() -> None:
    weight = known(500, 420, "power law 1").float().requires_grad_()
    plain = decompose(weight, 8, exact_below=0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            cast = decompose(weight, 8, exact_below=0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_equal(plain, cast)
    assert not cast.left.requires_grad


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.9 brought the setting")
def test_precision_of_a_backend_is_put_back() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with triplets.full_precision(torch.ones(1)):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        with pytest.raises(ValueError, match="rank 9"):
            decompose(random(3, 3), 9)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def assert_equal(one: Factors, two: Factors) -> None:
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))


def test_same_bits_every_time_in_any_order_and_no_random_number_drawn() -> None:
    weights = {name: known(500, 420, kind).float() for name, kind in (("a", "power law 1"), ("b", "power law 0.5"))}
    ranks = {"a": 8, "b": 6}
    state = torch.get_rng_state()
    first = decompose_layers(weights, ranks, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = decompose_layers(dict(reversed(weights.items())), ranks, progress=False)
    assert list(first) == ["a", "b"] and list(second) == ["b", "a"]
    for name in weights:
        assert_equal(first[name], second[name])
    torch.set_rng_state(state)
    assert_equal(decompose(weights["a"], 8, exact_below=0, seed=3), decompose(weights["a"], 8, exact_below=0, seed=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_weight_is_not_changed() -> None:
    weight = random(40, 30)
    before = weight.clone()
    decompose(weight, 5)
    assert torch.equal(weight, before)


def test_cache_is_read_bit_for_bit_and_nothing_is_decomposed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"x": random(60, 50).bfloat16(), "y": random(50, 60)}
    ranks = {"x": 4, "y": 5}
    first = decompose_layers(weights, ranks, cache_dir=tmp_path / "new", progress=False)
    assert len(list((tmp_path / "new").iterdir())) == 2
    monkeypatch.setattr(svd, "decompose", None)
    second = decompose_layers(weights, ranks, cache_dir=tmp_path / "new", progress=False)
    for name in weights:
        assert_equal(first[name], second[name])


@pytest.mark.parametrize(
    "change",
    [
        lambda w, s: (w + 1e-3, s), lambda w, s: (w.double(), s), lambda w, s: (w.reshape(25, 120), s),
        lambda w, s: (w, {**s, "tolerance": 1e-2}), lambda w, s: (w, {**s, "seed": 1}),
        lambda w, s: (w, {**s, "rank": 5}),
    ],
    ids=["values", "dtype", "shape", "tolerance", "seed", "rank"],
)  # fmt: skip
def test_cache_tells_everything_apart(tmp_path: Path, change: Callable) -> None:
    def run(weight: torch.Tensor, settings: dict) -> None:
        rank, rest = settings["rank"], {k: v for k, v in settings.items() if k != "rank"}
        decompose_layers({"x": weight}, {"x": rank}, cache_dir=tmp_path, progress=False, **rest)

    weight, settings = random(60, 50), {"rank": 4, "tolerance": 1e-3, "seed": 0}
    run(weight, settings)
    run(*change(weight, settings))
    assert len(list(tmp_path.iterdir())) == 2


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def _other(path: Path) -> None:
    save_file({"a": torch.ones(2)}, path)


@pytest.mark.parametrize("damage", [_truncated, _one_bit, _other, lambda path: path.write_bytes(b"")])
def test_damaged_cache_is_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    weights, ranks = {"x": random(60, 50)}, {"x": 4}
    decompose_layers(weights, ranks, cache_dir=tmp_path, progress=False)
    (path,) = tmp_path.iterdir()
    damage(path)
    with pytest.raises(ValueError, match=rf"x: .*{path.name}.*Delete this file"):
        decompose_layers(weights, ranks, cache_dir=tmp_path, progress=False)


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(svd.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        decompose_layers({"x": random(6, 5)}, {"x": 2}, cache_dir=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_lazy_weights_are_made_one_at_a_time() -> None:
    made = []

    def make(name: str) -> Callable[[], torch.Tensor]:
        return lambda: made.append(name) or random(20, 10)

    found = decompose_layers({"a": make("a"), "b": make("b")}, {"a": 2, "b": 3}, progress=False)
    assert made == ["a", "b"] and len(found["b"].values) == 3


@pytest.mark.parametrize(("progress", "enabled", "shown"), [(True, False, True), (None, False, False),
                                                            (None, True, True), (False, True, False)])  # fmt: skip
def test_progress_names_the_layer(
    progress: bool | None, enabled: bool, shown: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "is_progress_bar_enabled", lambda: enabled)
    decompose_layers({"encoder.q_proj": random(20, 10)}, {"encoder.q_proj": 2}, progress=progress)
    assert ("encoder.q_proj" in capsys.readouterr().err) == shown


def _zero3() -> torch.Tensor:
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_shape = 1, torch.Size([8, 6])  # type: ignore[attr-defined]
    return weight


def _poisoned(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = random(8, 6).to(dtype)
    weight[2, 3], weight[1, 1] = float("nan"), float("inf")
    return weight


REFUSED = {
    "meta": (lambda: torch.empty(8, 6, device="meta"), 2, "no values yet.*low_cpu_mem_usage"),
    "ZeRO-3": (_zero3, 2, r"ungathered shard of ZeRO-3.*\(8, 6\).*GatheredParameters"),
    "empty": (lambda: torch.empty(0, 6), 2, "is empty"),
    "vector": (lambda: torch.ones(6), 1, r"no matrix: expected \(out, in\)"),
    "convolution": (lambda: torch.ones(6, 3, 2, 2), 1, "no matrix"),
    "integers": (lambda: torch.ones(8, 6, dtype=torch.uint8), 2, "torch.uint8.*dequantised"),
    "quantised": (lambda: torch.quantize_per_tensor(random(8, 6), 0.1, 0, torch.qint8), 2, "dequantised"),
    "float8": (lambda: random(8, 6).to(torch.float8_e4m3fn), 2, "float8.*dequantised"),
    "rank 0": (lambda: random(8, 6), 0, "rank 0.*expected 1 to 6"),
    "rank 7": (lambda: random(8, 6), 7, "rank 7.*expected 1 to 6.*Lower r"),
    "not finite": (_poisoned, 2, "2 entries that are not finite"),
    "not finite, bf16": (lambda: _poisoned(torch.bfloat16), 2, "2 entries that are not finite"),
    "beyond fp32": (lambda: random(8, 6).double() * 1e300, 2, "not finite in fp32"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_to_do_and_name_the_layer(case: str, tmp_path: Path) -> None:
    make, rank, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        decompose(make(), rank)
    for cache in (None, tmp_path):
        with pytest.raises(ValueError, match=f"layers.3.q_proj: .*{message}"):
            decompose_layers({"layers.3.q_proj": make()}, {"layers.3.q_proj": rank}, cache_dir=cache, progress=False)


@pytest.mark.parametrize("tolerance", [0, -1e-3, float("nan")])
def test_tolerance_out_of_range(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance.*positive"):
        decompose(random(8, 6), 2, tolerance=tolerance)


def test_layers_and_ranks_must_agree() -> None:
    with pytest.raises(ValueError, match="same layers.*b, c"):
        decompose_layers({"a": random(4, 3), "b": random(4, 3)}, {"a": 1, "c": 1}, progress=False)


def test_dtensor_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(8, 6)
    sharded = weight[:4].clone()
    sharded.full_tensor = lambda: weight  # type: ignore[attr-defined]
    assert_equal(decompose(sharded, 2), decompose(weight, 2))


def test_accelerator_is_used_and_factors_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda: asked.append(torch.device("cpu")) or asked[-1]
    )
    assert decompose(random(8, 6), 2).left.device.type == "cpu" and asked
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="mps"))
    decompose(random(8, 6), 2)  # stays


def test_cache_holds_plain_safetensors(tmp_path: Path) -> None:
    decompose_layers({"x": random(8, 6)}, {"x": 2}, cache_dir=tmp_path, progress=False)
    (path,) = tmp_path.iterdir()
    assert {name: tuple(t.shape) for name, t in load_file(path).items()} == {
        "left": (8, 2), "values": (2,), "right": (2, 6)
    }  # fmt: skip
