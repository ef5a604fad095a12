"""`import hf_reg` is cheap and changes nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import hf_reg


def seconds(statement: str) -> float:
    code = f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)"
    times = [float(subprocess.check_output([sys.executable, "-c", code]).split()[-1]) for _ in range(3)]
    return statistics.median(times)


def test_import_costs_little() -> None:
    assert seconds("import hf_reg") < 1.2 * seconds("import transformers") + 0.05


def test_import_touches_nothing() -> None:
    code = """
import transformers.modeling_utils as m, torch
before = dict(vars(m.AttentionInterface)), dict(m.AttentionInterface._global_mapping), dict(vars(torch.nn.Module))
import hf_reg, hf_reg.patching, hf_reg.patches
hf_reg.patch_model
after = dict(vars(m.AttentionInterface)), dict(m.AttentionInterface._global_mapping), dict(vars(torch.nn.Module))
assert before == after
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_hides_a_public_name() -> None:
    """`import hf_reg.x` sets the attribute x of the package, which would stand before a function of that name."""
    modules = {path.stem for path in Path(hf_reg.__file__).parent.iterdir()}
    assert not modules & set(hf_reg.__all__)
    assert all(callable(getattr(hf_reg, name)) for name in hf_reg.__all__)
