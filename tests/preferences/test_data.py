"""Rows as token ids: those of TRL's own preparation; what cannot be used is refused or counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_reg import messages as said_by
from hf_reg.preferences import PreferenceCollator, cut, prepare_preferences

from .words import IMPLICIT_PLAIN, IMPLICIT_TURNS, PLAIN, TURNS, WORDS, said, tokenizer


IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def plain(rows: Any) -> list[dict[str, list[int]]]:
    return [{name: list(map(int, row[name])) for name in IDS} for row in rows]


@pytest.fixture
def said_aloud(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(said_by.logger, "warning", messages.append)
    return messages


@pytest.mark.parametrize("rows", [PLAIN, TURNS, IMPLICIT_PLAIN, IMPLICIT_TURNS])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_the_ids_and_batches_of_trl(rows: list[dict[str, Any]], mode: str, tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    trainer = trl.DPOTrainer(
        LlamaForCausalLM(config), LlamaForCausalLM(config),
        trl.DPOConfig(str(tmp_path), report_to="none", max_length=28, truncation_mode=mode, use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer(),
    )  # fmt: skip
    ours = prepare_preferences(rows, tokenizer(), max_length=28, truncation_mode=mode)
    theirs = plain(trainer.train_dataset)
    assert plain(ours) == theirs and len(ours) > 3
    batch = PreferenceCollator(0, 28, mode)(ours)
    expected = trainer.data_collator(theirs)
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor)
    torch.testing.assert_close(batch["chosen_lengths"], expected["completion_mask"][: len(ours), 1:].sum(1))


def test_the_end_is_learned() -> None:
    for row in prepare_preferences([*PLAIN, *TURNS], tokenizer()):
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokenizer().eos_token_id
        assert list(row["chosen_ids"]).count(tokenizer().eos_token_id) == 1


def test_prompts_of_several_pairs_and_prompts_given_twice() -> None:
    rows = [{**row, "prompt": "what the data set repeats"} for row in IMPLICIT_TURNS]  # as UltraFeedback does
    assert plain(prepare_preferences(rows, tokenizer())) == plain(prepare_preferences(TURNS, tokenizer()))
    pairs = [{"prompt": "go", "chosen": " on", "rejected": " " + word} for word in ("off", "away")]
    one, other = prepare_preferences(pairs, tokenizer())
    assert list(one["prompt_ids"]) == list(other["prompt_ids"]) and list(one["chosen_ids"]) == list(
        other["chosen_ids"]
    )


def test_the_prompt_has_a_limit_of_its_own() -> None:
    whole = prepare_preferences(PLAIN, tokenizer())
    for mode, part in (("keep_start", slice(7)), ("keep_end", slice(-7, None))):
        found = prepare_preferences(PLAIN, tokenizer(), max_prompt_length=7, truncation_mode=mode)
        for row, full in zip(found, whole, strict=True):
            assert list(row["prompt_ids"]) == list(full["prompt_ids"])[part]
            assert list(row["chosen_ids"]) == list(full["chosen_ids"])


@pytest.mark.parametrize(
    ("mode", "limit", "expected"),
    [
        ("keep_start", 9, ([1, 2, 3], [4, 5])), ("keep_start", 5, ([1, 2, 3], [4, 5])),
        ("keep_start", 4, ([1, 2, 3], [4])), ("keep_start", 2, ([1, 2], [])),
        ("keep_end", 4, ([2, 3], [4, 5])), ("keep_end", 2, ([], [4, 5])), ("keep_end", 1, ([], [5])),
        ("keep_start", None, ([1, 2, 3], [4, 5])),
    ],
)  # fmt: skip
def test_cut(mode: str, limit: int | None, expected: tuple[list[int], list[int]]) -> None:
    assert cut([1, 2, 3], [4, 5], limit, mode) == expected


@pytest.mark.parametrize(
    ("row", "mode", "reason"),
    [
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "keep_start", "1 with an empty answer"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "keep_start", "1 with an empty answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "keep_start", "1 with identical answers"),
        ({"prompt": "a", "chosen": "b", "rejected": "b<eos>"}, "keep_start", "1 with identical answers"),
        ({"prompt": [said("user", "a")], "chosen": [], "rejected": [said("assistant", "b")]}, "keep_start",
         "1 with an empty answer"),
        ({"prompt": [said("user", "a")], "chosen": [said("assistant", "")], "rejected": [said("assistant", "b")]},
         "keep_start", "1 with an empty answer"),
        ({"prompt": "a" * 30, "chosen": "b", "rejected": "c"}, "keep_start",
         "1 with an answer truncated away: the prompt fills max_length"),
        ({"prompt": "a", "chosen": "b" * 30, "rejected": "c"}, "keep_end",
         "1 with an answer that fills max_length and leaves no prompt"),
        ({"prompt": "a", "chosen": "b" * 30, "rejected": "b" * 31}, "keep_start",
         "1 with identical answers once truncated"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_counted(
    row: dict[str, Any], mode: str, reason: str, said_aloud: list[str]
) -> None:
    rows = [PLAIN[1], row]
    found = prepare_preferences(rows, tokenizer(), max_length=24, truncation_mode=mode, name="train")
    assert plain(found) == plain(prepare_preferences(rows[:1], tokenizer()))
    assert said_aloud[0] == f"train: 1 of 2 rows are left out: {reason}."
    with pytest.raises(ValueError, match=f"train: no usable pair in 1 rows: {reason}"):
        prepare_preferences([row], tokenizer(), max_length=24, truncation_mode=mode, name="train")


def test_cut_answers_are_counted(said_aloud: list[str]) -> None:
    prepare_preferences([{"prompt": "a", "chosen": "b" * 30, "rejected": "c"}], tokenizer(), max_length=24, name="it")
    assert said_aloud == ["it: answers of 1 of 1 rows are cut to fit max_length."]


TURN = [said("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, ValueError, "row 1: no column 'rejected'; found 'prompt', 'chosen'"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, TypeError, "row 1: 'chosen' is int .3.; expected a string"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, TypeError, "row 1: 'chosen' is NoneType"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c", "d"]}, TypeError, "Several pairs of one prompt are several"),
        ({"prompt": "a", "chosen": TURN, "rejected": "b"}, TypeError, "expected two of a kind"),
        ({"prompt": [said("user", "a")], "chosen": "b", "rejected": "c"}, TypeError, "'prompt' is a conversation"),
        ({"prompt": "a", "chosen": TURN, "rejected": [said("assistant", "c")]}, ValueError, "share no first turn"),
        ("text", TypeError, "row 1 is str; expected a mapping"),
        ({**PLAIN[0], "ref_chosen_logps": 1.0}, ValueError, "ref_chosen_logps without its partner"),
        ({**PLAIN[0], "ref_chosen_logps": 1.0, "ref_rejected_logps": 1.0}, ValueError, "only some rows hold"),
    ],
)  # fmt: skip
def test_rows_that_are_wrong_are_refused(row: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepare_preferences([PLAIN[0], row], tokenizer())


def test_tokenizers_that_lack_something_are_refused() -> None:
    with pytest.raises(ValueError, match="no pad_token. Set one"):
        prepare_preferences(PLAIN, tokenizer(pad_token=None))
    with pytest.raises(ValueError, match="no eos_token"):
        prepare_preferences(PLAIN, tokenizer(eos_token=None))
    with pytest.raises(ValueError, match="no chat template. Set tokenizer.chat_template"):
        prepare_preferences(TURNS, tokenizer(template=None))
    with pytest.raises(ValueError, match="found none"):
        prepare_preferences(PLAIN, None)
    with pytest.raises(TypeError, match="is no tokenizer"):
        prepare_preferences(PLAIN, len)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_length": 1}, "max_length=1 is out of range"), ({"max_prompt_length": 0}, "max_prompt_length=0"),
        ({"max_length": 8, "max_prompt_length": 8}, "leaves no room for an answer"),
        ({"truncation_mode": "keep_middle"}, "keep_middle"),
    ],
)  # fmt: skip
def test_limits_out_of_range(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_preferences(PLAIN, tokenizer(), **limits)
    with pytest.raises(ValueError, match="no usable pair in 0 rows"):
        prepare_preferences([], tokenizer())
