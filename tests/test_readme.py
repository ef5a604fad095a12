"""The Python blocks of the documents run, in order, each document in one namespace. What they name on the Hub is a
tiny model and its tokenizer here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_reg.patching import known_patches
from hf_reg.recipes import known_penalties

from .preferences.models import llama
from .preferences.words import tokenizer


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: llama())
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, document, "exec", dont_inherit=True), namespace)


def test_every_method_has_a_row() -> None:
    text = (ROOT / "README.md").read_text()
    for name in known_patches():
        assert f"| `{name}` |" in text
    for name in known_penalties():
        assert re.search(rf"^\| .*`{name}`.* \|", text, re.MULTILINE), name


def test_ci_runs_the_readme_s_test_command() -> None:
    assert "make test  " in (ROOT / "README.md").read_text() and "make test" in (ROOT / ".ci/run").read_text()
