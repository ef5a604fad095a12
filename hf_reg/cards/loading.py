"""The lines of code that load a model, with hf_reg and without; a test runs them."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields

from .facts import Facts, Use
from .private import LEFT_OUT, public


__all__ = ["BASE", "REPO", "load_own", "load_plain"]

REPO, BASE = "OWNER/NAME", "BASE"  # where no public name is known
ADAPTERS = ("sorsa", "ba_lora")


def _class(facts: Facts) -> str:
    return facts.auto_class or facts.architecture or "AutoModel"


def _base(facts: Facts) -> str:
    arguments = [f'"{facts.base_model or BASE}"']
    if facts.base_model and facts.base_revision:
        arguments.append(f'revision="{facts.base_revision}"')
    if facts.num_labels not in (None, 2):
        arguments.append(f"num_labels={facts.num_labels}")
    return f"base = {_class(facts)}.from_pretrained({', '.join(arguments)})"


def load_plain(facts: Facts) -> str:
    """With transformers, and PEFT for an adapter."""
    repo = facts.repo_id or REPO
    if not facts.adapter:
        return f'from transformers import {_class(facts)}\n\nmodel = {_class(facts)}.from_pretrained("{repo}")'
    return (
        f"from peft import PeftModel\nfrom transformers import {_class(facts)}\n\n"
        f'{_base(facts)}\nmodel = PeftModel.from_pretrained(base, "{repo}")'
    )


def _patching(use: Use) -> tuple[str, str]:
    """The call that patches a model as this one was, and the schedule that it needs, if any."""
    from ..patching import known_patches

    cls, shown, schedule = known_patches().get(use.name), [], ""
    defaults = {f.name: f.default for f in fields(cls) if f.default is not MISSING} if cls is not None else {}
    for name, value in use.settings.items():
        if value == LEFT_OUT or (cls is not None and name not in {f.name for f in fields(cls) if f.init}):
            continue
        if name in defaults and value == public(defaults[name]) and name != getattr(cls, "rate_field", None):
            continue
        if name == "schedule" and (found := re.match(r"(\w+)\(", value)):
            schedule = found.group(1)
        shown.append(f", {name}={value}")
    return f'patch_model(model, "{use.name}"{"".join(shown)})', schedule


def load_own(facts: Facts) -> str:
    """With hf_reg, to train on as before."""
    patches = [_patching(use) for use in facts.methods if use.kind == "patch"]
    terms = [f"`{use.name}`" for use in facts.methods if use.kind == "penalty"]
    svd = facts.adapter in ADAPTERS
    text = ""
    if patches or svd:
        names = ["get_regularized_peft_model"] * svd + ["patch_model"] * bool(patches)
        imports = [f"from hf_reg import {', '.join(names)}"]
        schedules = sorted({schedule for _, schedule in patches if schedule})
        imports += [f"from hf_reg.schedules import {', '.join(schedules)}"] * bool(schedules)
        if svd:
            imports += ["from huggingface_hub import snapshot_download", f"from transformers import {_class(facts)}"]
            repo = facts.repo_id or REPO
            body = [_base(facts), f'model = get_regularized_peft_model(base, snapshot_download("{repo}"))']
        else:
            plain = load_plain(facts).split("\n\n")
            imports, body = imports + plain[0].split("\n"), plain[1].split("\n")
        body += [call for call, _ in patches]
        text = "With hf_reg, to train on as before:\n\n```python\n" + "\n".join([*imports, "", *body]) + "\n```\n\n"
    if not text:
        text = "Nothing of hf_reg is needed to use it."
    for use in facts.methods:
        if use.kind == "loss":
            settings = ", ".join(f"{name}={value}" for name, value in use.settings.items())
            text += f"\n\nTo train on with the same loss: `RPOTrainer` of hf_reg with `RPOConfig({settings})`."
    if terms:
        text += (
            f"\n\nPenalties ({', '.join(terms)}) belong to the trainer: give it `penalties=` with the settings above."
        )
        if svd:
            text += " It takes those of the adapter by itself."
    places = [REPO] * (not facts.repo_id) + [BASE] * bool(facts.adapter and not facts.base_model)
    if places:
        means = {
            REPO: "this repository, or a folder that holds it",
            BASE: "the base model, which has no public name here",
        }
        text += "\n\n" + "; ".join(f"`{place}` stands for {means[place]}" for place in places) + "."
    return text.strip()
