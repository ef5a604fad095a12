"""`check_metadata` finds what the Hub would refuse, and what it would silently ignore."""

from __future__ import annotations

import pytest

from hf_reg.cards import check_metadata


GOOD = """---
license: apache-2.0
language: en
base_model: owner/base
base_model_relation: adapter
library_name: peft
pipeline_tag: text-generation
tags: [hf_reg, "arxiv:2310.18738", "base_model:adapter:owner/base"]
datasets: [owner/news]
metrics: [accuracy]
my_own_key: 3
model-index:
- name: x
  results:
  - task: {type: text-generation}
    dataset: {type: owner/news, name: news}
    metrics:
    - {type: accuracy, value: 0.5}
---
# A card
"""


def test_a_good_card() -> None:
    assert check_metadata(GOOD) == []
    assert check_metadata(GOOD.replace("\n", "\r\n")) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("license: apache-2.0", "licence: apache-2.0", "'licence' is no key that the Hub knows; is it 'license'?"),
        ("license: apache-2.0", "license: Apache 2.0", "license is 'Apache 2.0'"),
        ("license: apache-2.0", "license: 3", "license is 3"),
        ("license: apache-2.0", "license: other", "without license_name"),
        ("language: en", "language: no", "language is False"),
        ("language: en", "language: English", "language is 'English'"),
        ("base_model: owner/base", "base_model: /home/x/base", "base_model has '/home/x/base'"),
        ("base_model: owner/base", "base_model: [owner/base, ../x]", "base_model has '../x'"),
        ("base_model: owner/base\n", "", "stands without base_model"),
        ("relation: adapter", "relation: lora", "base_model_relation is 'lora'"),
        ("library_name: peft", "library_name: [peft]", "library_name is ['peft']"),
        ("tag: text-generation", "tag: text-generaton", "is it 'text-generation'?"),
        ("[hf_reg, ", "[3, ", "tags is [3"),
        ("adapter:owner/base", "adapter:/home/x", "tags has '/home/x'"),
        ("adapter:owner/base", "adapter:", "tags has ''"),
        ("datasets: [owner/news]", "datasets: [a/b/c]", "datasets has 'a/b/c'"),
        ("value: 0.5", "value: .nan", "accuracy is nan: expected a finite number"),
        ("value: 0.5", "value: .inf", "expected a finite number"),
        ("value: 0.5", "value: high", "accuracy is 'high'"),
        ("value: 0.5", "value: true", "accuracy is True"),
        (", value: 0.5", "", "a metric lacks its type or value"),
        ("value: 0.5", "value: !!python/object/apply:numpy.float64 [0.5]", "is no YAML that can be read"),
        ("task: {type: text-generation}", "task: text-generation", "lacks task.type"),
        (", name: news", "", "lacks dataset.type or dataset.name"),
        ("metrics:\n    - {type: accuracy, value: 0.5}", "metrics: []", "lacks its list of metrics"),
        ("- name: x\n", "- nome: x\n", "a model lacks its name"),
        ("library_name: peft", "library_name: 'peft", "is no YAML"),
        ("# A card", "hf_" + "aB3" * 12, "The card holds the token hf_aB3..."),
    ],
)
def test_problems(old: str, new: str, problem: str) -> None:
    assert GOOD.count(old) >= 1
    found = check_metadata(GOOD.replace(old, new, 1))
    assert any(problem in one for one in found), found


def test_other_shapes() -> None:
    assert "There is no metadata" in check_metadata("# A card\n")[0]
    assert "The metadata is list" in check_metadata("---\n- a\n---\n")[0]
    assert "expected a list of models" in check_metadata("---\nmodel-index: {}\n---\n")[0]
    assert check_metadata("---\nlicense:\n---\n") == []
