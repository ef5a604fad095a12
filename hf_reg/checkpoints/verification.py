"""`verify_checkpoint`: whether a folder is a sound checkpoint, seen by a process that does not know hf_reg."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..adapters.merging import TOLERANCES
from ..distributed import loading_whole
from ..json_text import check_size
from ..tables import Shown
from ..training.loss_scale import evaluating
from .folder import ADAPTER, check_folder, find_problems, read_folder_block, weight_files
from .loading import base_of, class_of, load_regularized
from .reading import read_block
from .stock import OUTPUTS, PROBE, RESULT, outputs_of


__all__ = ["Check", "Verification", "verify_checkpoint"]

CLEAN = "import runpy, sys; sys.modules['hf_reg'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
SHOWN = 5  # names in a message
LARGEST_CARD = 1_000_000  # bytes; we chose it, cards have some thousand
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of safetensors, and of torch
Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `passed` is None where it could not be."""

    name: str
    passed: bool | None
    found: str


@dataclass
class Verification(Shown):
    """What [`verify_checkpoint`] found; prints as a table.

    Attributes:
        path (`str`): the folder.
        checks (`list[Check]`): what was looked at, in order.
        largest (`float`, *optional*): largest absolute difference of a logit between the processes.
        relative (`float`, *optional*): that over the largest absolute logit.
    """

    path: str
    checks: list[Check] = field(default_factory=list)
    largest: float | None = None
    relative: float | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong; checks that could not be made do not count."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words."""
        return [f"{check.name}: {check.found}" for check in self.checks if check.passed is False]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        checks = [{"name": check.name, "passed": check.passed, "found": check.found} for check in self.checks]
        found = {"path": self.path, "passed": self.passed, "problems": self.problems, "checks": checks}
        return found | {"largest_logit_difference": self.largest, "relative_logit_difference": self.relative}

    def add(self, name: str, problems: list[str], found: str) -> bool:
        """Note a check: its problems, or what was found if there are none."""
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        self.checks.append(Check(name, not problems, "; ".join(problems[:SHOWN]) + more if problems else found))
        return not problems

    def skip(self, name: str, why: str) -> None:
        """Note a check that could not be made."""
        self.checks.append(Check(name, None, f"skipped: {why}"))

    def attempt(self, name: str, function: Callable[[], Any]) -> Any:
        """What `function` returns; what it raises is a problem, and then None."""
        try:
            return function()
        except Exception as error:
            self.add(name, [f"{type(error).__name__}: {error}"], "")
            return None

    def _table(self) -> Table:
        title = Text(f"{self.path}: {'sound' if self.passed else 'NOT sound'}")
        table = Table(title=title, title_justify="left")
        for column in ("check", "", "found"):
            table.add_column(column)
        for check in self.checks:
            table.add_row(check.name, {True: "ok", False: "FAILED", None: "-"}[check.passed], Text(check.found))
        return table


def _recipe(folder: Path, report: Verification) -> None:
    block = report.attempt("recipe", lambda: (read_folder_block(folder),))
    if block is None:
        return
    if block[0] is None:
        report.skip("recipe", "the checkpoint names no regularization")
    elif recipe := report.attempt("recipe", lambda: read_block(block[0])):
        names = [*(patch.name for patch in recipe.patches), *(penalty.name for penalty in recipe.penalties)]
        report.add("recipe", [], f"hf_reg {recipe.version}: {', '.join(names) or 'own penalties only'}")


def _card_text(path: Path) -> str:
    check_size(path, LARGEST_CARD)
    return path.read_text(encoding="utf-8")


def _card(folder: Path, report: Verification) -> None:
    path = folder / "README.md"
    if not path.is_file():
        report.skip("card", "there is no README.md")
    elif importlib.util.find_spec("hf_reg.cards") is None:
        report.skip("card", "this hf_reg has no hf_reg.cards to check it with")
    else:
        cards = importlib.import_module("hf_reg.cards")
        problems = report.attempt("card", lambda: cards.check_metadata(_card_text(path)))
        if problems is not None:
            report.add("card", list(problems), "its metadata is valid")


def _in_a_new_process(request: dict[str, Any], probe: Any, place: Path, timeout: float) -> dict[str, Any]:
    """What a process without hf_reg makes of the request; the probe and the outputs are in `place`."""
    (place / "request.json").write_text(json.dumps(request))
    if probe is not None:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in probe.items()}, place / PROBE)
    command = [sys.executable, "-c", CLEAN, str(Path(__file__).with_name("stock.py")), str(place)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"the process ended with {done.returncode}"]
        raise RuntimeError(f"stock transformers cannot load and run it: {last[0]}")
    return json.loads((place / RESULT).read_text())


def _stored_dtypes(folder: Path) -> list[str]:
    found: set[str] = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}
    return sorted(found)


def _compare(
    report: Verification, stock: dict[str, torch.Tensor], here: dict[str, torch.Tensor], against: str
) -> None:
    shapes = [{name: tuple(one.shape) for name, one in outputs.items()} for outputs in (stock, here)]
    if shapes[0] != shapes[1]:
        report.add("logits", [f"the new process returned {shapes[0]}, {against} {shapes[1]}"], "")
        return
    dtype = next(iter(here.values())).dtype
    pairs = [(one.double(), here[name].double()) for name, one in stock.items()]
    report.largest = max(float((one - other).abs().max()) for one, other in pairs)
    report.relative = report.largest / max(max(float(other.abs().max()) for _, other in pairs), 1e-30)
    accepted = TOLERANCES.get(dtype, 0.0)
    found = f"largest difference from {against} {report.largest:.3g}, {report.relative:.3g} of the largest logit"
    report.add("logits", [] if report.relative <= accepted else [f"{found}; accepted: {accepted:g}"], found)


def verify_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    probe: Mapping[str, torch.Tensor] | None = None,
    base: str | os.PathLike[str] | None = None,
    timeout: float = 600.0,
) -> Verification:
    """Load a checkpoint in a new process in which hf_reg cannot be imported, and see whether all is as it should be:
    files, recipe, card, keys, dtype, tied weights, finite weights, and the logits of a probe.

    Args:
        path (`str` or `PathLike`): a folder with a model, or with a LoRA, SORSA or BA-LoRA adapter.
        model (`nn.Module`, *optional*):
            What was saved there, to compare logits with; by default what [`load_regularized`] makes of the folder.
        probe (mapping of `str` to `torch.Tensor`, *optional*): inputs; by default 16 random tokens, or an image.
        base (`str` or `PathLike`, *optional*): for an adapter: its base, if not the one that it names.
        timeout (`float`, *optional*, defaults to 600): seconds for the new process.

    Returns:
        [`Verification`]: `passed`, `problems`, `checks` and the largest difference of a logit. A checkpoint whose
        files would run code or lead out of the folder is not loaded.

    Raises:
        `FileNotFoundError`: if `path` is no folder. A bad checkpoint raises nothing.

    Example:

    ```python
    print(verify_checkpoint("out", model=trainer.model))
    ```
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Give the one that save_pretrained or save_model wrote.")
    report = Verification(str(folder))
    problems = report.attempt("files", lambda: find_problems(folder))
    if problems is not None:
        report.add("files", problems, "safetensors and text; nothing executable, no token")
    found = report.attempt("layout", lambda: check_folder(folder))
    _recipe(folder, report)
    _card(folder, report)
    if found is None:
        report.skip("load", "it may not be safe")
        return report
    stored = report.attempt("layout", lambda: _stored_dtypes(folder))
    if stored is None:
        return report
    report.add("layout", [], ", ".join(path.name for path in weight_files(folder)))
    adapter = found if (folder / ADAPTER).is_file() else None
    place = folder if adapter is None else report.attempt("base", lambda: base_of(adapter, base))
    loader = None if place is None else report.attempt("load", lambda: class_of(place, adapter))
    if loader is None:
        return report
    request = {
        "loader": loader.__name__, "base": str(place.resolve()),
        "adapter": None if adapter is None else str(folder.resolve()),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        stock = report.attempt("load", lambda: _in_a_new_process(request, probe, out, timeout))
        if stock is not None:
            _judge(report, stock, stored, model)
            against = "the live model" if model is not None else "load_regularized"
            live = model
            if live is None:
                with loading_whole():
                    live = report.attempt("recipe", lambda: load_regularized(folder, base=base))
            here = None if live is None else report.attempt("logits", lambda: _outputs(live, load_file(out / PROBE)))
            if here:
                _compare(report, load_file(out / OUTPUTS), here, against)
    return report


def _outputs(model: nn.Module, probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with evaluating(model):
        return outputs_of(model, probe)


def _judge(report: Verification, stock: dict[str, Any], stored: list[str], model: nn.Module | None) -> None:
    """What the new process says of its model."""
    report.add("load", [], "stock transformers, without hf_reg")
    keys = [f"{kind} {name}" for kind in ("missing", "unexpected") for name in stock[kind]]
    report.add("keys", keys, "none missing, none unexpected")
    wrong = []
    if not stock["adapter"] and stock["dtype"] not in [DTYPES.get(name) for name in stored]:
        wrong.append(f"the configuration says {stock['dtype']}, stored are {', '.join(stored)}")
    live = {parameter.dtype for parameter in model.parameters()} if model is not None else set()
    if live and getattr(torch, stock["dtype"]) not in live:
        wrong.append(f"{stock['dtype']} when loaded, {', '.join(map(str, live))} in the live model")
    report.add("dtype", wrong, f"{stock['dtype']}; stored {', '.join(stored)}")
    untied = [f"{name} is no longer tied" for name in stock["untied"]]
    report.add("tied weights", untied, ", ".join(stock["tied"]) or "none")
    report.add("finite weights", [f"{name} is not finite" for name in stock["infinite"]], "all")
