"""The rules by which terms are scaled, and what a process has to know about others, as plain functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_reg.distributed import data_parallel, named_whole_parameters, seed_rank, whole
from hf_reg.training.loss_scale import count_items, divides_by_items, evaluating, item_weight, penalty_factor
from hf_reg.training.terms import Terms

from .distributed.heads import HEADS, make, rows


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_a_penalty_counts_once_a_step(scaled: bool, accumulation: int) -> None:
    later = 1.0 if scaled else 1.0 / accumulation  # what training_step still divides by
    each = [penalty_factor(scaled, accumulation) * later for _ in range(accumulation)]
    assert sum(each) == pytest.approx(1)
    assert penalty_factor(scaled, accumulation, once=True) * later == pytest.approx(1)


def test_item_weights_make_a_mean_of_means_the_mean() -> None:
    counts, processes = [[3, 5], [1, 7]], 2  # micro-batches by process
    values = [[torch.randn(n, dtype=torch.float64) for n in mine] for mine in counts]
    total = sum(map(sum, counts))
    mine = [sum(v.mean() * item_weight(len(v), total, len(vs), processes) / len(vs) for v in vs) for vs in values]
    assert sum(mine) / processes == pytest.approx(torch.cat([v for vs in values for v in vs]).mean().item())
    assert item_weight(torch.tensor(4.0), torch.tensor(16.0), 2, 2) == 1


def test_items_are_labels_or_examples() -> None:
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    assert count_items({"labels": labels}) == 3
    assert count_items({"labels": torch.tensor([0.5, 1.5])}) == 2
    assert count_items({"flag": True, "input_ids": labels}) == 2
    with pytest.raises(ValueError, match="A batch without a tensor"):
        count_items({"flag": True})


@pytest.mark.parametrize("head", HEADS)
def test_models_are_asked_whether_they_divide(head: str) -> None:
    model = make(head).train()
    model.eval_only = nn.Dropout().eval()
    batch = {key: torch.stack([row[key] for row in rows(head)]) for key in rows(head)[0]}
    state = torch.get_rng_state()
    assert divides_by_items(model, batch) is (head in ("tokens/llama", "lora/llama"))
    assert torch.equal(state, torch.get_rng_state())
    assert (
        model.training
        and not model.eval_only.training
        and all(m.training for m in model.children() if m is not model.eval_only)
    )


def test_evaluating_restores_modes_after_an_exception() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(KeyError), evaluating(model):
        assert not model[0].training and not torch.is_grad_enabled()
        raise KeyError
    assert model[0].training and not model[1].training and torch.is_grad_enabled()


def test_terms_are_read_once() -> None:
    terms, reductions = Terms(), []

    def over_processes(values: torch.Tensor) -> torch.Tensor:
        reductions.append(values.shape)
        return values

    for value in (1.0, 3.0):
        terms.add("a", torch.tensor(value), weight=2)
        terms.add("b", torch.tensor(-value, dtype=torch.bfloat16))
    assert terms.mean(over_processes) == {"a": 2.0, "b": -2.0} and not terms
    terms.add("a", torch.tensor(1.5))
    assert terms.total(over_processes) == {"a": 1.5} and terms.total(over_processes) == {}
    assert len(reductions) == 2


def test_ranks_that_share_a_batch_share_a_stream() -> None:
    tensor_parallel = SimpleNamespace(non_data_parallel_size=2)
    ranks = [
        data_parallel(SimpleNamespace(process_index=r, num_processes=4, parallelism_config=tensor_parallel))
        for r in range(4)
    ]
    assert ranks == [(0, 2), (0, 2), (1, 2), (1, 2)]
    draws = []
    for seed, rank in ((1, 0), (1, 1), (1, 2), (2, 1), (1, 1)):
        torch.manual_seed(seed)
        seed_rank(seed, rank)
        draws.append(torch.rand(3).tolist())
    torch.manual_seed(1)
    assert draws[0] == torch.rand(3).tolist() and draws[1] == draws[4]
    assert len({tuple(draw) for draw in draws}) == 4


def test_shards_are_not_mistaken_for_parameters() -> None:
    parameter = nn.Parameter(torch.randn(3, 2))
    assert whole(parameter) is parameter
    for shard in (nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(2, device="meta"))):
        with pytest.raises(ValueError, match="is a shard or a placeholder"):
            whole(shard)
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [name for name, _ in named_whole_parameters(model, "trainable")] == ["weight"]
    with pytest.raises(ValueError, match="No trainable parameter of Linear is in the scope 'adapters'"):
        list(named_whole_parameters(model, "adapters"))
