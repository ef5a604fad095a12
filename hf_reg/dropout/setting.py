"""`set_dropout`: the model's own dropout set by kind, and added where it has none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..base import check_range
from ..patching import unwrap
from ..seams.attention import gates
from .added import GATES, add, remove_added
from .places import ACTIVATION, DROP, PLAIN, PROBABILITIES, Map, Place, under
from .report import DropoutReport, DropoutRow


__all__ = ["set_dropout"]

RESIDUAL_FIELD = re.compile(r"(hidden|resid(ual)?|emb(d|ed|edding)?|feat_proj)_p?drop")


def _lora_layers(model: nn.Module) -> tuple[list[tuple[str, nn.ModuleDict, str]], dict[str, int]]:
    """PEFT's dropouts as (path, dict, adapter) of active adapters, and the layers that do not use theirs."""
    found, unused = [], Counter[str]()
    for path, module in model.named_modules():
        dropouts = getattr(module, "lora_dropout", None)
        if not isinstance(dropouts, nn.ModuleDict):
            continue
        if type(module).__name__ in ("Embedding", "ParamWrapper"):
            unused[f"lora.{type(module).__name__}"] += 1
            continue
        active = getattr(module, "active_adapters", list(dropouts))
        found += [(f"{path}.lora_dropout.{name}", dropouts, name) for name in dropouts if name in active]
    return found, dict(unused)


def _set_lora(model: nn.Module, rate: float) -> list[DropoutRow]:
    found, _ = _lora_layers(model)
    for _, dropouts, name in found:
        training = dropouts.training
        dropouts[name] = (nn.Dropout(rate) if rate else nn.Identity()).train(training)
    return [DropoutRow("lora", path, rate, "module") for path, _, _ in found]


def _feeds(name: str, others: Sequence[str], places: Sequence[Place]) -> set[str]:
    """The kinds whose rate a configuration field called `name` is."""
    if PROBABILITIES.match(name):
        return {"attention"}
    if ACTIVATION.match(name):
        return {"ffn"}
    if RESIDUAL_FIELD.match(name):
        return {"hidden"}
    if name == "mlp_dropout":  # ModernBERT's is between the projections
        return {"ffn"} if any(place.kind == "ffn" for place in places) else {"hidden"}
    if not PLAIN.fullmatch(name):
        return set()
    return {
        "hidden",
        *({"attention"} - set().union(*(_feeds(o, (), ()) for o in others if not PLAIN.fullmatch(o)))),
    } | (set() if any(ACTIVATION.match(other) for other in others) else {"ffn"})


def _sync_config(model: nn.Module, places: Sequence[Place], kinds: set[str]) -> None:
    """Write the rates into the configuration fields that they come from, where one rate is all that a field feeds."""
    configs: dict[int, tuple[str, PreTrainedConfig]] = {}
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs.setdefault(id(config), (path, config))
    for path, config in configs.values():
        here = [place for place in places if under(place.path, path)]
        names = [n for n, v in vars(config).items() if DROP.search(n) and type(v) in (int, float)]
        for name in names:
            fed = _feeds(name, names, here)
            rates = {getattr(place.owner, place.attribute) for place in here if place.kind in fed}
            if fed & kinds and len(rates) == 1:
                setattr(config, name, rates.pop())


def set_dropout(
    model: nn.Module,
    *,
    attention: float | None = None,
    hidden: float | None = None,
    ffn: float | None = None,
    lora: float | None = None,
) -> DropoutReport:
    """Set the dropout of `model` by kind, in place; where its class has none, hooks add it, and 0 removes them again.

    Attention dropout is the model's own or none. Where a layer has no residual dropout (Llama, Mistral, Qwen, Gemma),
    `hidden` adds it to the output of the attention and of the FFN, before a norm that may follow, as Vaswani et al.
    (2017, section 5.4) put it before the addition. Where it has no dropout on the activation, `ffn` adds it at the
    input of the down-projection. Task heads, layerdrop and stochastic depth are left alone. Fields of `model.config`
    that are the source of these rates are kept in step, so that a saved checkpoint says what was used; a field that
    feeds several kinds (T5's `dropout_rate`) is written only if they agree, and added dropout has no field. Models
    that are made from the same configuration object later start with these rates.

    Adding dropout does not show in the checkpoint: call `set_dropout` again after loading, and after `get_peft_model`.

    Args:
        model (`nn.Module`): a transformers model, or one inside PEFT, DDP, FSDP or `torch.compile`.
        attention (`float`, *optional*): rate on attention probabilities. None leaves any kind as it is.
        hidden (`float`, *optional*): rate on residual branches and embeddings.
        ffn (`float`, *optional*): rate on the activation between the up- and the down-projection.
        lora (`float`, *optional*): rate on the input of PEFT's LoRA layers, for their active adapters.

    Returns:
        [`DropoutReport`]: what was set where; its `verify` proves it.

    Raises:
        `ValueError`: a rate outside [0, 1), no rate at all, or a kind for which the model has no place.
        `TypeError`: a rate that is no number, or something that is no model. In every case the model is as it was.

    Example:

    ```python
    set_dropout(model, attention=0.1, hidden=0.1).verify(**batch)
    ```
    """
    given = {"attention": attention, "hidden": hidden, "ffn": ffn, "lora": lora}
    for kind, rate in given.items():
        if rate is not None:
            check_range("set_dropout", kind, rate, 0, 1)
    rates = {kind: float(rate) for kind, rate in given.items() if rate is not None}
    if not rates:
        raise ValueError(f"set_dropout was given no rate. Give one of {', '.join(given)}, such as hidden=0.1.")
    inner = unwrap(model)
    held = sorted({gate.patch.name for gate in gates(inner) if gate.patch.seam == "dropout"})
    if held:
        raise ValueError(
            f"{', '.join(held)} holds the dropout of this model, and would not know of the new rates. Call "
            f"set_dropout before patch_model, or unpatch_model(model, {held[0]!r}) first."
        )
    map_ = Map(inner)
    added = {kind: map_.missing(kind) for kind in rates}
    loras, unused = _lora_layers(inner) if "lora" in rates else ([], {})
    uncovered = {kind: map_.uncovered(kind, added[kind]) if kind != "lora" else unused for kind in rates}
    for kind, rate in rates.items():
        if not (loras if kind == "lora" else map_.of(kind) or added[kind]):
            names = ", ".join(f"{count} x {name}" for name, count in uncovered[kind].items())
            remedy = "wrap the model with peft.get_peft_model first" if kind == "lora" else "leave this kind out"
            raise ValueError(
                f"{kind}={rate}: {type(inner).__name__} has no place for it"
                f"{f' (out of reach: {names})' if names else ''}; {remedy}."
            )
    flex = [site.path for site in map_.sites if site.implementation == "flex_attention"]
    if rates.get("attention") and flex:
        raise ValueError(
            f"attention={attention}: flex_attention has no dropout ({len(flex)} modules, first {flex[0]}). Load the "
            "model with attn_implementation='sdpa' or 'eager', or use hidden dropout."
        )

    torch.compiler.reset()  # compiled code is not told that a module changed
    rows: list[DropoutRow] = []
    for kind, rate in rates.items():
        if kind == "lora":
            rows += _set_lora(inner, rate)
            continue
        for place in map_.of(kind):
            setattr(place.owner, place.attribute, rate)
            rows.append(DropoutRow(kind, place.path, rate, place.how))
        if kind in GATES:
            remove_added(inner, kind)
        for path, module in added[kind].items() if rate else ():
            add(module, kind, rate)
            rows.append(DropoutRow(kind, f"{path}.{GATES[kind]}", rate, "added"))
    _sync_config(inner, map_.places, set(rates))
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if "lora" in rates and isinstance(configs, dict):
            for name in {name for _, _, name in loras} & configs.keys():
                configs[name].lora_dropout = rates["lora"]
    return DropoutReport(inner, rows, {kind: classes for kind, classes in uncovered.items() if classes})
