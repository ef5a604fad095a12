"""Teacher logits on disk: the value is that of the teacher, the teacher is asked once, and nothing stale is read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from hf_reg import penalties as P
from hf_reg.training.fingerprints import data_fingerprint, example_hashes, teacher_fingerprint
from hf_reg.training.teacher import Teacher
from hf_reg.training.teacher_cache import TeacherCache
from hf_reg.training.teacher_store import TeacherStore

from .distributed.heads import VOCABULARY, difference, make, rows
from .distributed.launch import launch
from .test_fused_training import history, run


HEAD = "lora/llama"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many examples the teacher was asked for, each time."""
    found: list[int] = []
    plain = Teacher.__call__

    def counted(self: Teacher, inputs: Any) -> Any:
        found.append(len(inputs["input_ids"]))
        return plain(self, inputs)

    monkeypatch.setattr(Teacher, "__call__", counted)
    yield found


def train(folder: Path | None, top_k: int = 8, epochs: int = 2, **settings: Any) -> Any:
    settings = {"model": make(HEAD).double(), "max_steps": -1, "num_train_epochs": epochs} | settings
    settings.setdefault("train_sampling_strategy", "random")
    terms = settings.pop("penalties", None) or [P.Consistency(weight=0.5), P.Diversity(weight=0.1, top_k=5)]
    where = None if folder is None else str(folder)
    return run(terms, teacher_cache=where, teacher_cache_top_k=top_k, **settings)


def same(ours: Any, other: Any) -> None:
    for found, wanted in zip(ours.spy.steps, other.spy.steps, strict=True):
        assert difference(found, wanted) < 1e-6
    for one, two in zip(history(ours), history(other), strict=True):
        assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_with_all_columns_it_is_the_teacher_itself(tmp_path: Path, calls: list[int], fused: bool) -> None:
    wanted = train(None, fused_loss=fused)
    assert calls == [4, 4, 4, 4]
    calls.clear()
    ours = train(tmp_path, top_k=VOCABULARY, fused_loss=fused)
    assert calls == [4, 4], "the second epoch asks for nothing"
    assert (ours._fused.head is not None) is fused
    same(ours, wanted)
    calls.clear()
    same(train(tmp_path, top_k=VOCABULARY, fused_loss=not fused), wanted)
    assert calls == [], "a further run asks for nothing"


def test_fused_and_whole_logits_agree_on_a_lower_bound(tmp_path: Path) -> None:
    ours, other = (train(tmp_path / str(fused), fused_loss=fused) for fused in (True, False))
    same(ours, other)
    exact = train(None)
    for found, wanted in zip(history(ours)[:1], history(exact)[:1], strict=True):
        assert 0 < found["loss_consistency"] < wanted["loss_consistency"]
        assert found["loss_diversity"] == pytest.approx(wanted["loss_diversity"])


def test_an_interrupted_run_is_taken_up(tmp_path: Path, calls: list[int]) -> None:
    train(tmp_path, epochs=1, max_steps=1)
    assert calls == [4]
    (folder,) = tmp_path.iterdir()
    (folder / "half.partial").write_bytes(b"not a whole file")
    calls.clear()
    train(tmp_path)
    assert calls == [4], "half of the examples are there"
    names = sorted(path.suffix for path in folder.iterdir())
    assert names == [".json", ".partial", ".safetensors", ".safetensors"]


def test_classification(tmp_path: Path, calls: list[int]) -> None:
    from .test_fused_training import peft

    models = [peft(make("classes/llama"), task_type="SEQ_CLS").double() for _ in range(2)]
    ours, other = (
        train(folder, 3, model=model, head="classes/llama", penalties=[P.Consistency(weight=0.5)])
        for folder, model in zip((tmp_path, None), models, strict=True)
    )
    for one, two in zip(history(ours), history(other), strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    assert len(calls) == 2 + 4


class Rows(Dataset):
    """Told apart by its length alone."""

    def __init__(self, found: list[dict[str, torch.Tensor]]) -> None:
        self.found = found

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.found[index]


@pytest.mark.parametrize("what", ["input_ids", "labels"])
def test_other_tokens_raise(tmp_path: Path, what: str) -> None:
    train(tmp_path, data=Rows(rows(HEAD)))
    train(tmp_path, data=Rows(rows(HEAD)))
    changed = rows(HEAD)
    changed[3][what] = changed[3][what].clone()
    changed[3][what][1] = 5 if what == "input_ids" else -100
    with pytest.raises(ValueError, match="Example 3 has other tokens or other answer positions .* Delete that folder"):
        train(tmp_path, data=Rows(changed))


def test_every_combination_has_a_folder_of_its_own(tmp_path: Path) -> None:
    def folders() -> int:
        return len(list(tmp_path.iterdir()))

    def other(change: str) -> nn.Module:
        model = make(HEAD).double()
        for name, parameter in model.named_parameters():
            if change in name:
                parameter.data.add_(0.1)
        return model

    train(tmp_path, epochs=1)
    train(tmp_path, epochs=1, model=other("lora_"))
    assert folders() == 1, "the adapter is not the teacher"
    more: list[dict[str, Any]] = [
        {"top_k": 9}, {"penalties": [P.Consistency(temperature=3.0)]}, {"model": other("layers.0.mlp")},
        {"data": rows(HEAD)[::-1]}, {"model": make(HEAD)}, {"bf16": True},
    ]  # fmt: skip
    for number, settings in enumerate(more, start=2):
        train(tmp_path, epochs=1, **settings)
        assert folders() == number, settings


def test_fingerprints() -> None:
    import datasets

    plain = [{key: value.tolist() for key, value in row.items()} for row in rows(HEAD)]
    known = datasets.Dataset.from_list(plain)
    assert data_fingerprint(known) == data_fingerprint(known) != data_fingerprint(known.select(range(4)))
    assert data_fingerprint(plain) == data_fingerprint(rows(HEAD)) != data_fingerprint(plain[::-1])
    tokens, counts = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[False, False, False, True, False]])
    attended = tokens > 0
    left = example_hashes(tokens, attended, counts)
    assert left == example_hashes(tokens.roll(-2, 1), attended.roll(-2, 1), counts.roll(-2, 1))
    assert example_hashes(tokens[:, :], None, counts) == example_hashes(
        torch.cat([tokens, tokens * 0], 1), None, torch.cat([counts, counts & False], 1)
    )
    assert left != example_hashes(tokens, attended, counts.roll(-1, 1))
    trained = make(HEAD)
    trained.base_model.model.model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match="model.norm.weight and 0 more parameters are trained and belong to the tea"):
        teacher_fingerprint(Teacher(trained))
    own = make("tokens/llama")
    assert teacher_fingerprint(Teacher(trained, own)) == teacher_fingerprint(Teacher(make(HEAD), own))


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    class Compares(P.LogitsPenalty):
        NAME, NEEDS = "compares", frozenset({"logits", "teacher"})

    for settings, text in (
        ({"penalties": {"confidence": 0.1}}, "need a teacher are: none"),
        ({"penalties": [P.Consistency(), Compares()]}, "need a teacher are: consistency, compares"),
        ({"penalties": [P.Consistency(form="mse")]}, "need a teacher are: consistency"),
        ({"top_k": 0}, "teacher_cache_top_k=0 is out of range"),
        ({"data_collator": drop_ids}, "needs input_ids and example ids, but the batch holds"),
    ):
        with pytest.raises(ValueError, match=text):
            train(tmp_path, **settings)  # type: ignore[arg-type]


def drop_ids(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in found]) for key in ("input_ids", "labels")}


def test_evaluation_compares_with_the_whole_teacher(tmp_path: Path, calls: list[int]) -> None:
    ours, other = train(tmp_path), train(None)
    for made in (ours, other):
        made.model.load_state_dict(make(HEAD).double().state_dict())
    calls.clear()
    assert ours.evaluate()["eval_loss_consistency"] == pytest.approx(other.evaluate()["eval_loss_consistency"])
    assert calls == [8, 8]


def test_a_store_sees_what_others_write(tmp_path: Path) -> None:
    one, two = TeacherStore(tmp_path), TeacherStore(tmp_path)
    kept = P.top_logits(torch.randn(5, 9), 3, 2.0)
    one.add(7, 123, kept)
    one.add(8, 124, P.top_logits(torch.randn(0, 9), 3, 2.0))
    two.refresh()
    assert two.find(7, 123) is None and torch.equal(one.find(7, 123).values, kept.values)
    one.flush()
    one.flush()
    two.refresh()
    assert len(two) == len(one) == 2 and len(list(tmp_path.iterdir())) == 1
    for store in (one, two, TeacherStore(tmp_path)):
        store.refresh()
        for part in ("values", "indices", "logsumexp"):
            assert torch.equal(getattr(store.find(7, 123), part), getattr(kept, part))
        assert store.find(8, 124).values.shape == (0, 3)
        with pytest.raises(ValueError, match="Example 7 has other tokens"):
            store.find(7, 124)


def test_processes_read_what_others_computed(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(name: str, cache: TeacherCache, first: int) -> P.TopLogits:
        part = rows(HEAD)[first : first + 2]
        batch = {key: torch.stack([row[key] for row in part]) for key in part[0]}
        mask = P.answer_mask(model, batch, batch["labels"][..., None])
        assert mask is not None

        def compute() -> P.TopLogits:
            asked.append(name)
            return P.top_logits(torch.arange(int(mask.sum()) * 9.0).reshape(-1, 9) + first, 3, 2.0)

        ids = {"example_ids": torch.arange(first, first + 2)}
        return cache(batch | ids, mask, Teacher(model), rows(HEAD), compute)

    model = make(HEAD)
    one, two = (TeacherCache(str(tmp_path), 3, [P.Consistency()], "no") for _ in range(2))
    ask("one", one, 0)
    ask("two", two, 2)
    for cache in (one, two):
        cache.flush()
    for first in (0, 2, 1):
        found, other = ask("one", one, first), ask("two", two, first)
        assert all(torch.equal(getattr(found, part), getattr(other, part)) for part in P.TopLogits.__annotations__)
    assert asked == ["one", "two"]


@pytest.mark.distributed
def test_two_processes_share_a_folder(tmp_path: Path, calls: list[int]) -> None:
    launch("tests.test_teacher_cache", str(tmp_path))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    alone = train(tmp_path / "cache", batch=2, accumulation=2, train_sampling_strategy="sequential")
    assert calls == [], "two processes have written all examples"
    for found, wanted in zip(torch.load(tmp_path / "steps.pt"), alone.spy.steps, strict=True):
        assert difference(found, wanted) < 1e-6


if __name__ == "__main__":
    made = train(Path(sys.argv[1]) / "cache", batch=2, train_sampling_strategy="sequential")
    assert made.args.world_size == 2
    if made.args.process_index == 0:
        torch.save(made.spy.steps, Path(sys.argv[1]) / "steps.pt")
