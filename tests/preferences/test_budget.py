"""Micro-batches by a budget of tokens: whole epochs, the same batches again, and steps that are means over pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_reg.preferences.budget import TokenBudgetSampler, pair_sizes

from .models import lora, trainer
from .words import PLAIN


def test_every_pair_once_within_the_budget() -> None:
    sizes = [int(size) for size in torch.randint(20, 200, (500,), generator=torch.Generator().manual_seed(0))]
    sampler = TokenBudgetSampler(sizes, 1000, seed=3)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    assert all(sum(sizes[index] for index in batch) <= 1000 for batch in batches)
    assert len(batches) == len(sampler) <= 1.05 * sum(sizes) / 1000 + 1
    sampler.set_epoch(1)
    again = list(sampler)
    assert again != batches and sorted(map(tuple, again)) == sorted(map(tuple, batches))
    sampler.set_epoch(0)
    assert list(sampler) == batches == list(TokenBudgetSampler(sizes, 1000, seed=3))
    assert list(TokenBudgetSampler(sizes, 1000, seed=4)) != batches


def test_a_pair_beyond_the_budget() -> None:
    with pytest.raises(ValueError, match="Pair 1 has 30 tokens, max_tokens_per_batch is 20. Raise it, or lower"):
        TokenBudgetSampler([10, 30, 20], 20)
    with pytest.raises(ValueError, match="max_tokens_per_batch"):
        TokenBudgetSampler([10, 30, 20], 0)


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_every_process_has_as_many_batches(processes: int) -> None:
    sampler = TokenBudgetSampler([10] * 25, 40, processes=processes)
    assert len(sampler) % processes == 0
    assert sorted(index for batch in sampler for index in batch) == list(range(25))


def test_sizes_are_those_of_the_layout() -> None:
    pair = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}
    assert pair_sizes([pair], None, "keep_start", True) == [6]
    assert pair_sizes([pair], None, "keep_start", False) == [9]
    assert pair_sizes([pair], 4, "keep_start", True) == [5]
    assert pair_sizes([pair], 4, "keep_end", True) == [8]  # two different ends of the prompt


@pytest.mark.parametrize("shared", [True, False])
def test_a_run(shared: bool, tmp_path: Path) -> None:
    sizes: list[int] = []
    made = trainer(tmp_path, lora(moved=0.1), max_tokens_per_batch=120, max_steps=-1, num_train_epochs=2,
                   share_prompts=shared)  # fmt: skip
    inner, pairs = made.data_collator, []
    made.data_collator = lambda rows: pairs.append(len(rows)) or inner(rows)
    scores = made._scores._values

    def counted(batch: Any, layout: Any, model: Any, whole: bool = False) -> Any:
        sizes.append(layout.inputs["input_ids"].numel() if shared else int(batch["attention_mask"].sum()))
        return scores(batch, layout, model, whole)

    made._scores._values = counted  # type: ignore[method-assign]
    made.train()
    assert made.state.global_step == 2 * len(made.get_train_dataloader()) > 4
    assert sum(pairs[1 : 1 + made.state.global_step]) == 2 * len(PLAIN)  # the first is a trial
    assert max(sizes) <= 120 and len(set(pairs)) > 1


def test_one_step_of_all_pairs_is_that_of_one_batch(tmp_path: Path) -> None:
    """The mean is over pairs, whichever batches they are in."""
    found = []
    for settings in (
        {"max_tokens_per_batch": 120, "gradient_accumulation_steps": 32},
        {"max_tokens_per_batch": 10_000},
        {},
    ):
        made = trainer(tmp_path, lora(moved=0.1), max_steps=-1, num_train_epochs=1, **settings)
        made.train()
        assert made.state.global_step == 1
        found.append({name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad})
    for name, value in found[-1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)


def test_resuming_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    settings = {"max_tokens_per_batch": 120, "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
    whole = trainer(tmp_path / "a", lora(moved=0.1), max_steps=-1, **settings)
    whole.train()
    again = trainer(tmp_path / "b", lora(moved=0.1), max_steps=-1, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert again.state.global_step == whole.state.global_step > 3
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
