"""Killed and resumed runs, random streams by rank, sharded parameters, launches that are not what was asked for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .heads import difference, make, rows
from .launch import environment, launch, run
from .run import PARAMETER_PENALTIES
from .weights import found as of_a_patch


pytestmark = pytest.mark.distributed
RUN = "tests.distributed.run"


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "history.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def same_run(a: Path, b: Path) -> None:
    after = {entry["step"]: entry for entry in history(b)}
    assert after and all(after[e["step"]] == e for e in history(a) if e["step"] in after), (history(a), history(b))
    for (name, x), y in zip(weights(a).items(), weights(b).values(), strict=True):
        assert torch.equal(x, y), name


def nearly_same_run(a: Path, b: Path) -> None:
    for x, y in zip(history(a), history(b), strict=True):
        assert x == pytest.approx(y, rel=1e-5)
    found, wanted = weights(a), weights(b)
    assert found.keys() == wanted.keys()
    for name in wanted:
        if not name.endswith("key.bias"):  # softmax cancels it: its gradient is rounding, which Adam makes large
            assert torch.allclose(found[name], wanted[name], atol=1e-5), name


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path: Path, processes: int) -> None:
    """40 rows are 10 steps an epoch on one process and 5 on two; the run dies at step 5 or 8, saved at 3 or 6."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launch(RUN, "train", str(whole), processes=processes)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", RUN]
    killed = run([*launcher, "train", str(broken), "--kill", "8" if processes == 2 else "5"])
    assert killed.returncode != 0 and not (broken / "history.json").exists()
    assert sorted(path.name for path in broken.glob("checkpoint-*"))[0] == "checkpoint-3"
    launch(RUN, "train", str(broken), "--resume", processes=processes)
    same_run(whole, broken)


@pytest.mark.slow
def test_elastic_restart_resumes_by_itself(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launch(RUN, "train", str(whole))
    launch(
        RUN, "train", str(broken), "--kill", "8",
        options=("--max-restarts", "3", "--monitor-interval", "1"), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )  # fmt: skip
    same_run(whole, broken)


def test_ranks_draw_masks_of_their_own_and_repeat_them(tmp_path: Path) -> None:
    for seed in ("42", "7"):
        launch(RUN, "masks", str(tmp_path), "--seed", seed)
    drawn = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("masks-*.json")}
    assert len(drawn) == 4 and len({json.dumps(one) for one in drawn.values()}) == 4
    before = dict(drawn)
    launch(RUN, "masks", str(tmp_path), "--seed", "42")
    assert json.loads((tmp_path / "masks-42-1.json").read_text()) == before["masks-42-1.json"]


def penalty_gradient(name: str) -> dict[str, torch.Tensor]:
    """Of the task and one penalty, of the whole batch on one process."""
    from hf_reg.recipes import make_penalties

    model, part = make("classes/bert"), rows("classes/bert")
    penalty = make_penalties({name: dict(PARAMETER_PENALTIES[name])})[0]
    penalty.prepare(model)
    loss = model(**{key: torch.stack([row[key] for row in part]) for key in part[0]}).loss
    (loss + penalty.weight * penalty(model, {}, None)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_penalties_on_parameters(tmp_path: Path, sharded: bool) -> None:
    launch(RUN, "penalties", str(tmp_path), *(["--sharded"] if sharded else []))
    found = torch.load(tmp_path / "gradients.pt")
    assert len(found) == 2 * len(PARAMETER_PENALTIES)
    for (name, accumulation), gradient in found.items():
        assert difference(gradient, penalty_gradient(name)) < 1e-5, (name, accumulation)


def test_patches_at_weights(tmp_path: Path) -> None:
    launch("tests.distributed.weights", str(tmp_path))
    results = torch.load(tmp_path / "gradients.pt")
    assert len(results) == 4
    for (patch, accumulation), gradient in results.items():
        assert difference(gradient, of_a_patch(patch, 1, 1)) < 1e-5, (patch, accumulation)
    launch("tests.distributed.weights", str(tmp_path), "--sharded")
    for rank in (0, 1):
        said = (tmp_path / f"refused-{rank}").read_text()
        assert "factorized trains other tensors in place of the weights, which FSDP would shard" in said


@pytest.mark.slow
def test_a_sharded_run_saves_what_one_process_saves(tmp_path: Path) -> None:
    launch(RUN, "train", str(tmp_path / "sharded"), "--sharded", "--steps", "3")
    launch(RUN, "train", str(tmp_path / "whole"), "--steps", "3")
    nearly_same_run(tmp_path / "sharded", tmp_path / "whole")


@pytest.mark.slow
def test_zero3_trains_what_one_process_trains(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")
    launch(RUN, "train", str(tmp_path / "zero3"), "--zero3", "--steps", "3")
    launch(RUN, "train", str(tmp_path / "whole"), "--steps", "3")
    nearly_same_run(tmp_path / "zero3", tmp_path / "whole")


@pytest.mark.slow
def test_two_nodes_on_loopback(tmp_path: Path) -> None:
    command = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "2",
        "--main_process_ip", "127.0.0.1", "--main_process_port", "29647", "--mixed_precision", "no",
        "--dynamo_backend", "no",
    ]  # fmt: skip
    import sys

    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", *command, "--machine_rank", str(rank), "-m", RUN, "train", str(tmp_path / "nodes")],
            env=environment(ACCELERATE_USE_CPU="true"), cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (1, 0)
    ]  # fmt: skip
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), said
    launch(RUN, "train", str(tmp_path / "one"))
    same_run(tmp_path / "one", tmp_path / "nodes")


@pytest.mark.parametrize(
    ("command", "settings", "text"),
    [
        (["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
          "no", "--dynamo_backend", "no"], {}, "starts one without MPI"),
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], {"ALONE": "1"}, "this one trains alone"),
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], {"FSDP": "1"}, "FSDP was asked for"),
    ],
)  # fmt: skip
def test_a_launch_that_is_not_what_was_asked_for_is_refused(
    tmp_path: Path, command: list[str], settings: dict[str, Any], text: str
) -> None:
    done = run([*command, "-m", "tests.distributed.refused", str(tmp_path)], **settings)
    assert done.returncode != 0 and text in done.stdout + done.stderr, done.stdout[-500:] + done.stderr[-3000:]
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.slow
def test_a_parameter_that_only_a_penalty_uses(tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.distributed.refused"]
    done = run([*command, str(tmp_path)], UNUSED="find")
    assert done.returncode != 0 and "set ddp_find_unused_parameters=False" in done.stderr, done.stderr[-2000:]
    done = run([*command, str(tmp_path)], UNUSED="all")
    assert done.returncode == 0, done.stderr[-3000:]
