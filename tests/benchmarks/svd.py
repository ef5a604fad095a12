"""Initialisation by SVD: how fast and how close to the exact one, against PEFT's `pissa_niter_16`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial

import torch

from hf_reg.adapters.svd import Factors, decompose

from .steps import minilm
from .timing import Row, interleave, ratio


RANKS = (16, 64)
MANY = 256  # iterations with which the peer comes nearer on a flat spectrum, though not as near


def power_law(size: int, exponent: float) -> torch.Tensor:
    """A square weight with random singular vectors and the values i^-exponent: a slowly falling tail is the hard
    case."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    return (u * torch.arange(1, size + 1).float() ** -exponent) @ v.mT


def peft(weight: torch.Tensor, rank: int, iterations: int = 16) -> Factors:
    """What PEFT computes for `init_lora_weights="pissa_niter_16"`."""
    left, values, right = torch.svd_lowrank(weight, q=rank, niter=iterations)
    return Factors(left, values, right.mT)


def overlap(found: Factors, exact: Factors) -> float:
    """Mean squared cosine of the principal angles, left or right, whichever is worse."""
    left = (found.left.double().mT @ exact.left.double()).square().sum()
    right = (found.right.double() @ exact.right.double().mT).square().sum()
    return min(float(torch.minimum(left, right)) / len(exact.values), 1.0)


def difference(found: Factors, exact: Factors) -> float:
    """||A - A_r||_F / ||A_r||_F, by the factors alone."""
    left = torch.cat([found.left * found.values, -exact.left * exact.values], 1).double()
    right = torch.cat([found.right, exact.right]).double()
    core = torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT
    return float(core.norm() / exact.values.double().norm())


def full(weight: torch.Tensor) -> tuple[Factors, float]:
    start = time.process_time()
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    return Factors(u, values, vh), time.process_time() - start


def leading(exact: Factors, rank: int) -> Factors:
    return Factors(exact.left[:, :rank], exact.values[:rank], exact.right[:rank])


def against_peft(
    case: str, weights: Sequence[torch.Tensor], exact: Sequence[Factors], rank: int, rounds: int, iterations: int = 16
) -> tuple[list[Row], list[float]]:
    """Rows of time and of the worst difference over `weights`, and the seconds of ours."""
    peer = f"pissa_niter_{iterations}"
    theirs = partial(peft, iterations=iterations)
    target = 1.0 if iterations == 16 else None  # with more, what closeness costs the peer: for information
    times = interleave(
        {
            "hf_reg": lambda: [decompose(weight, rank) for weight in weights],
            peer: lambda: [theirs(weight, rank) for weight in weights],
        },
        rounds, f"svd {case}, rank {rank}", warmup=1,
    )  # fmt: skip
    middle, spread = ratio(times, "hf_reg", peer)
    worst = {
        name: max(difference(make(w, rank), leading(e, rank)) for w, e in zip(weights, exact, strict=True))
        for name, make in (("hf_reg", decompose), (peer, theirs))
    }
    case = f"{case}, rank {rank}"
    rows = [
        Row("svd", f"{case}, time", "hf_reg", peer, middle, target, spread=spread),
        Row(
            "svd", f"{case}, low-rank difference", f"{worst['hf_reg']:.1e}", f"{peer} {worst[peer]:.1e}",
            worst["hf_reg"] / worst[peer], target,
        ),
    ]  # fmt: skip
    return rows, times["hf_reg"]


def allowed(case: str, what: str, found: float, limit: float) -> Row:
    """A row of an error in units of the largest one allowed."""
    return Row("svd", f"{case}, {what} / {limit:g}", f"{found:.1e}", "exact SVD", found / limit, 1.0)


def run(rounds: int) -> list[Row]:
    rows = []
    weight = power_law(4096, 0.5)
    exact, seconds = full(weight)
    for rank in RANKS:
        case = f"4096 x 4096, i^-0.5, rank {rank}"
        compared, ours = against_peft("4096 x 4096, i^-0.5", [weight], [exact], rank, 3)
        speed_up = seconds / statistics.median(ours)
        found = decompose(weight, rank)
        rows.append(Row("svd", f"{case}, speed-up", "hf_reg", "full SVD", speed_up, 25.0, at_least=True))
        rows.append(allowed(case, "1 - overlap", 1 - overlap(found, leading(exact, rank)), 1e-4))
        rows.append(allowed(case, "low-rank difference", difference(found, leading(exact, rank)), 1e-3))
        rows += compared
    for shape in ((384, 384), (1536, 384), (2048, 2048)):
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        exact, _ = full(weight)
        for rank in RANKS:
            case = f"{shape[0]} x {shape[1]}, random"
            rows += against_peft(case, [weight], [exact], rank, min(rounds, 7))[0]
            rows += against_peft(case, [weight], [exact], rank, 2, MANY)[0]
    named = minilm().named_modules()
    weights = [layer.weight.detach() for name, layer in named if ".encoder." in name and hasattr(layer, "in_features")]
    spectra = [full(weight.double())[0] for weight in weights]
    for rank in RANKS:
        case = f"{len(weights)} weights of MiniLM"
        rows += against_peft(case, weights, spectra, rank, min(rounds, 5))[0]
        rows += against_peft(case, weights, spectra, rank, 2, MANY)[0]
        worst = min(overlap(decompose(w, rank), leading(e, rank)) for w, e in zip(weights, spectra, strict=True))
        rows.append(allowed(f"MiniLM, rank {rank}", "1 - overlap", 1 - worst, 1e-3))
    return rows
