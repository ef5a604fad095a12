"""What a card says about each method, read off its class: summary, formula, paper. And what it costs."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

from ..costs import Cost, costs
from .facts import Use


__all__ = ["MEASURED", "Method", "cost_of", "method_of"]

PAPER = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})")
LINK = re.compile(r"\[(`[^`]+`)\](?:\([^)]*\))?")


@dataclass(frozen=True)
class Method:
    """What a card says about a method: a sentence or two, a formula, and the number of its paper on arXiv."""

    summary: str = ""
    formula: str = ""
    paper: str = ""


PLAIN_LORA = Method("LoRA: low-rank factors beside frozen weights.", "W x = W_0 x + (alpha / r) B A x", "2106.09685")
OF_PEFT = Method("A loss that belongs to the adapter, as PEFT defines it.")
OWN = Method("The user's own, whose code is not part of this card.")


def _of_class(cls: type, formula: str) -> Method:
    doc, module = inspect.getdoc(cls) or "", sys.modules[cls.__module__].__doc__ or ""
    paper = PAPER.search(doc) or PAPER.search(module)
    summary = LINK.sub(r"\1", " ".join(doc.partition("\n\n")[0].split()))
    return Method(summary, formula, paper.group(1) if paper else "")


def method_of(use: Use) -> Method:
    """The method that was used, where it is installed; else an empty one."""
    from ..adapters.storage import CONFIGS
    from ..losses import rpo
    from ..optimizers import COMPANIONS
    from ..patching import known_patches
    from ..recipes import known_penalties

    kind, name = use.kind, use.method or use.name
    if kind == "loss" and name in ("rpo", "dpo"):
        paper = PAPER.search(rpo.__doc__ or "")
        assert paper is not None
        if name == "dpo":
            return Method("Direct preference optimization: the chosen answer more likely than the rejected one.",
                          "L = mean_b(-log sigmoid(beta h))", "2305.18290")  # fmt: skip
        summary = (
            "Regularized preference optimization (RPO): of two answers the chosen one becomes likelier than the "
            "rejected one, and its own likelihood is a part of the loss, so that it does not fall meanwhile."
        )
        return Method(summary, "", paper.group(1))
    if kind == "patch" and name in known_patches():
        cls: Any = known_patches()[name]
        return _of_class(cls, cls.formula)
    if kind == "penalty" and name in known_penalties():
        cls = known_penalties()[name]
        return _of_class(cls, cls.FORMULA)
    if kind == "companion" and name in COMPANIONS:
        cls = COMPANIONS[name]
        return _of_class(cls, cls.FORMULA)
    if kind == "adapter" and name in CONFIGS:
        cls = CONFIGS[name]
        return _of_class(cls, cls.FORMULA)
    if kind == "adapter" and name == "lora":
        return PLAIN_LORA
    if kind == "penalty" and name == "peft":
        return OF_PEFT
    return OWN if kind in ("penalty", "companion") else Method()


_STEP, _LARGE, _PAIRS = "MiniLM step, 16 x 128", "56M step, 4 x 256", "56M step, 4 pairs, prompt 128, answers 128"
MEASURED = {  # the line of costs.md that a card quotes, where it is not the one under the name of the method
    "tlm": ("TLM", _STEP, "TLM", "no dropout"),
    "drophead": ("DropHead", _STEP, "multiply", "unpatched"),
    "drophead, skip": ("DropHead", _STEP, "skip, p = 0.2", "unpatched"),
    "sorsa": ("SORSA", f"{_LARGE}, r = 16", "SORSA and its decoupled step", "PEFT LoRA"),
    "sorsa, folded": ("SORSA", f"{_LARGE}, r = 16", "SORSA, folded", "PEFT LoRA"),
    "ba_lora": ("BA-LoRA", _LARGE, "BA-LoRA", "LoRA, transformers' loss"),
    "rpo": ("RPO", _PAIRS, "RPOTrainer", "TRL"),
}


def cost_of(use: Use) -> Cost | None:
    """The measured cost of a method with its settings, if the benchmarks have it."""
    variants = [name for name in ("skip", "folded") if use.settings.get(name) == "True"]
    name = ", ".join([use.method or use.name, *variants])
    found = [one for one in costs()[1] if one[:4] == MEASURED.get(name, (one.section, _STEP, name, one.peer))]
    return found[0] if found else None
