"""Lines are whole, however writers end and however many there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_reg.json_lines import Lines
from hf_reg.runs.errors import RunError

from .distributed.launch import environment


def test_a_torn_line_does_not_count_and_is_cut_off(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "cells.jsonl")
    assert lines.read() == []
    lines.append({"key": "a", "value": 0.1 + 0.2})
    whole = lines.path.read_bytes()
    lines.path.write_bytes(whole + b'{"schema": 1, "key": "b' + b"x" * 10_000)
    assert lines.read() == [{"schema": 1, "key": "a", "value": 0.1 + 0.2}]
    lines.append({"key": "c"})
    assert lines.path.read_bytes() == whole + b'{"schema": 1, "key": "c"}\n'


def test_a_file_of_a_torn_line_alone(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "cells.jsonl")
    lines.path.write_bytes(b'{"sch')
    assert lines.read() == []
    lines.append({"key": "a"})
    assert [one["key"] for one in lines.read()] == ["a"]


@pytest.mark.parametrize(
    ("line", "what"), [(b"{}", "is no line"), (b"[1", "is no line"), (b'{"schema": 2}', "schema 2")]
)
def test_other_lines_are_named(tmp_path: Path, line: bytes, what: str) -> None:
    lines = Lines(tmp_path / "cells.jsonl")
    lines.append({"key": "a"})
    with lines.path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(RunError, match=rf"cells.jsonl: line 2 .*{what}"):
        lines.read()


def test_no_number_that_json_has_not(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "cells.jsonl")
    with pytest.raises(ValueError):
        lines.append({"value": float("nan")})
    assert lines.read() == []


WRITE = """
import sys
from pathlib import Path
from hf_reg.json_lines import Lines
for number in range(25):
    Lines(Path(sys.argv[1])).append({"who": sys.argv[2], "number": number, "long": "x" * 5000})
"""


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, str(path), who], env=environment()) for who in "ab"]
    assert [one.wait(timeout=120) for one in writers] == [0, 0]
    found = Lines(path).read()
    assert sorted((one["who"], one["number"]) for one in found) == [(who, n) for who in "ab" for n in range(25)]
