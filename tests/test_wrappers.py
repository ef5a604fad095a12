"""Models inside DDP, FSDP 1 and FSDP 2: patched before or after the wrapper, trained, unpatched; one gloo process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_reg import describe, patch_model, unpatch_model
from hf_reg.seams.attention import gates

from .architectures import build, forward
from .properties import lively, same, without_dropout


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": lambda model: DistributedDataParallel(model, find_unused_parameters=True),  # the pooler of BERT
    "FSDP1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    "FSDP2": sharded,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_model_trains_as_the_bare_one(process_group: None, name: str, when: str) -> None:
    tiny = build("bert")
    bare = lively(without_dropout(tiny.model)).train()
    inputs = tiny.inputs

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [output.detach().clone() for output in forward(model, inputs)]

    plain = outputs(bare)
    expected = outputs(patch_model(bare, ["tlm", "drophead"]))
    if when == "after":
        unpatch_model(bare)
    wrapped = WRAPPERS[name](bare)
    if when == "after":
        assert patch_model(wrapped, ["tlm", "drophead"]) is wrapped
    assert same(outputs(wrapped), expected) and not same(expected, plain)
    sum(output.sum() for output in forward(wrapped, inputs)).backward()
    assert any(parameter.grad is not None for parameter in wrapped.parameters())
    assert not any("hf_reg" in key for key in wrapped.state_dict())
    assert "2 / 2" in str(describe(wrapped))
    assert unpatch_model(wrapped) is wrapped and not list(gates(wrapped))
    assert same(outputs(wrapped), plain)
