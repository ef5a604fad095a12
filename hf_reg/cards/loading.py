"""The lines of code that load a model, with hf_reg and without; a test runs them."""

from __future__ import annotations

from .facts import Facts


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


def _regularized(facts: Facts) -> str:
    """With hf_reg: the checkpoint's own record names the patches and the adapter."""
    arguments = [f'"{facts.repo_id or REPO}"']
    if facts.adapter:
        arguments.append(f'auto_class="{_class(facts)}"')
        arguments += [] if facts.base_model else [f'base="{BASE}"']
        arguments += [] if facts.num_labels in (None, 2) else [f"num_labels={facts.num_labels}"]
    return f"from hf_reg import load_regularized\n\nmodel = load_regularized({', '.join(arguments)}).train()"


def load_own(facts: Facts) -> str:
    """With hf_reg, to train on as before."""
    terms = [f"`{use.name}`" for use in facts.methods if use.kind == "penalty"]
    svd = facts.adapter in ADAPTERS
    if svd or any(use.kind == "patch" for use in facts.methods):
        text = f"With hf_reg, to train on as before:\n\n```python\n{_regularized(facts)}\n```\n\n"
    else:
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
    if beside := [f"`{use.name}`" for use in facts.methods if use.kind == "companion"]:
        names = ", ".join(beside)
        text += f"\n\nBeside the optimizer acts {names}: give the trainer `companions=` with the settings above."
    places = [REPO] * (not facts.repo_id) + [BASE] * bool(facts.adapter and not facts.base_model)
    if places:
        means = {
            REPO: "this repository, or a folder that holds it",
            BASE: "the base model, which has no public name here",
        }
        text += "\n\n" + "; ".join(f"`{place}` stands for {means[place]}" for place in places) + "."
    return text.strip()
