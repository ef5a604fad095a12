"""Facts as a trainer, a model or a folder knows them. Only fields that are named here are read, so that nothing else
of the arguments, the configuration or the logs can get onto a card."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.block import COMPANIONS
from .facts import Facts, Use
from .private import is_private, public, repo_id_or_none
from .tasks import task_of_class, task_of_peft


__all__ = ["of_folder", "of_model", "of_trainer"]

SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "bf16", "fp16",
    "label_smoothing_factor", "neftune_noise_alpha", "max_length", "max_prompt_length", "truncation_mode",
    "max_tokens_per_batch", "disable_dropout",
)  # fmt: skip
PEFT = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights")
RPO = ("variant", "beta", "eta", "base", "label_smoothing")
LOGS = re.compile(
    r"(step|epoch|loss|grad_norm|learning_rate|(loss|share)_\w+|(eval_)?(rewards|logps)/\w+|eval_[\w@./-]+)$"
)
NOT_RESULTS = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time")


def of_trainer(trainer: Any) -> Facts:
    """Of a `Trainer`, after training or before."""
    args, state = trainer.args, trainer.state
    facts = of_model(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False), past=False)
    formula = getattr(args, "formula", None)
    if formula is not None:
        settings = {name: public(getattr(args, name)) for name in RPO}
        facts.methods.insert(0, Use("loss", "rpo" if args.eta else "dpo", settings, formula))
        facts.reference = str(trainer.reference)
    facts.methods += [_penalty(one) for one in getattr(trainer, "penalties", ())]
    facts.methods += [_companion(one) for one in getattr(trainer, "companions", ())]
    facts.trainer = type(trainer).__name__
    facts.repo_id = repo_id_or_none(args.hub_model_id) or ""
    facts.training = _training(args, state)
    facts.seeds = [args.seed]
    facts.hardware = _hardware(args)
    facts.history = _history(state.log_history)
    best = getattr(state, "best_global_step", None) if args.load_best_model_at_end else None
    facts.results, facts.results_from = _results(facts.history, best)
    facts.final = _final(facts.history)
    return facts


def of_model(model: nn.Module, *, past: bool = True) -> Facts:
    """Of a model with its patches and adapters; with `past`, what its configuration says of an earlier training."""
    from ..description import _of_model
    from ..patching import unwrap
    from ..seams.attention import gates

    base: Any = unwrap(model)
    wrapper: Any = next((one for one in model.modules() if hasattr(one, "get_base_model")), None)
    adapters: Mapping[str, Any] = wrapper.peft_config if wrapper is not None else {}
    facts = Facts(architecture=type(base).__name__.removeprefix("FSDP"))
    task, config = task_of_class(facts.architecture), getattr(base, "config", None)
    facts.auto_class, facts.pipeline_tag = task.auto_class, task.pipeline_tag
    name, commit = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    for adapter in adapters.values():
        name = adapter.base_model_name_or_path or name
        facts.methods.append(_adapter(adapter))
        facts.adapter = facts.methods[0].name
    _set_base(facts, name, commit)
    patches = {gate.patch.name: gate.patch for gate in gates(base)}
    rows = _of_model(base).rows if patches else []
    for patch in patches.values():
        reached = [f"{row.patched} of {row.found} in {row.submodel}" for row in rows if row.method == patch.name]
        settings = {key: public(value) for key, value in patch.settings().items()}
        facts.methods.append(Use("patch", patch.name, settings, coverage=", ".join(reached)))
    facts.num_labels = getattr(config, "num_labels", None) if "Classification" in facts.auto_class else None
    facts.versions = _versions(bool(adapters))
    if past:
        _add_block(facts, getattr(config, "hf_reg", None), without=("patch",) if patches else ())
    return facts


def of_folder(folder: Path) -> Facts:
    """Of what was saved."""
    from .writing import FACTS

    if (folder / FACTS).is_file():
        return Facts.from_json((folder / FACTS).read_text(encoding="utf-8"))
    config, adapter = _read(folder / "config.json"), _read(folder / "adapter_config.json")
    if not config and not adapter:
        raise ValueError(
            f"{folder} holds neither config.json nor adapter_config.json: expected a folder that save_pretrained or "
            "a trainer's save_model wrote. Or pass the trainer or the model."
        )
    facts = Facts(versions=_versions(bool(adapter)))
    if adapter:
        task = task_of_peft(adapter.get("task_type"))
        own = _read(folder / "hf_reg.json")
        if "method" in own:
            settings = {"r": 16, **own["settings"]}  # the file has what differs from the defaults
            shown = {key: public(value) for key, value in settings.items() if key != "svd_cache_dir"}
            use = Use("adapter", own["method"], shown | _targets(settings.get("target_modules", "all-linear")))
        else:
            settings = {key: public(adapter[key]) for key in PEFT if adapter.get(key) is not None}
            settings |= _targets(adapter.get("target_modules"))
            use = Use("adapter", str(adapter.get("peft_type", "peft")).lower(), settings)
        facts.adapter = use.name
        facts.methods.append(use)
        _set_base(facts, adapter.get("base_model_name_or_path"), adapter.get("revision"))
        _add_block(facts, own.get("hf_reg"))
    else:
        facts.architecture = next(iter(config.get("architectures") or ()), "")
        task = task_of_class(facts.architecture)
        _set_base(facts, config.get("_name_or_path"), None)
        _add_block(facts, config.get("hf_reg"))
    facts.auto_class, facts.pipeline_tag = task.auto_class, task.pipeline_tag
    facts.history = _history(_read(folder / "trainer_state.json").get("log_history", ()))
    facts.results, facts.results_from = _results(facts.history, None)
    facts.final = _final(facts.history)
    return facts


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}): the card cannot be made from this folder.") from error
    return found if isinstance(found, dict) else {}


def _set_base(facts: Facts, name: Any, commit: str | None) -> None:
    facts.base_model = repo_id_or_none(name, revision=commit)
    facts.base_revision = commit if facts.base_model and re.fullmatch(r"[\w.-]+", commit or "") else None
    facts.base_is_local = bool(name) and facts.base_model is None


def _add_block(facts: Facts, block: Any, without: Iterable[str] = ()) -> None:
    """What `config.hf_reg` says: `{version, patches: {name: settings}, penalties: ..., seed, versions}`."""
    if not isinstance(block, Mapping):
        return
    for kind, key in (("patch", "patches"), ("penalty", "penalties"), ("companion", COMPANIONS)):
        for name, settings in (block.get(key) or {}).items() if kind not in without else ():
            found = dict(settings) if isinstance(settings, Mapping) else {"weight": settings}
            method = str(found.pop("method", ""))
            shown = {
                str(one): _schedule(value) if one == "schedule" else public(value) for one, value in found.items()
            }
            facts.methods.append(Use(kind, str(name), shown, method=method))
    if isinstance(block.get("seed"), int):
        facts.seeds = [block["seed"]]
    versions = {**(block.get("versions") or {}), **({"hf_reg": block["version"]} if "version" in block else {})}
    kept = {str(key): str(value) for key, value in versions.items() if re.fullmatch(r"[\w.+-]+", str(value))}
    facts.versions = kept or facts.versions


def _fields(one: Any, without: Iterable[str] = ()) -> dict[str, str]:
    return {f.name: public(getattr(one, f.name)) for f in fields(one) if f.init and f.name not in without}


def _schedule(value: Any) -> str:
    """`{name: settings}` as the call that makes it."""
    if isinstance(value, Mapping) and len(value) == 1 and isinstance(settings := next(iter(value.values())), Mapping):
        return f"{next(iter(value))}({', '.join(f'{name}={public(one)}' for name, one in settings.items())})"
    return public(value)


def _penalty(penalty: Any) -> Use:
    from ..recipes import known_penalties
    from ..training.adapter_losses import AdaLoraLoss, AdapterLoss

    ours = known_penalties().get(penalty.NAME) is type(penalty)
    other = "peft" if isinstance(penalty, (AdapterLoss, AdaLoraLoss)) else "custom"
    return Use("penalty", penalty.name, _fields(penalty, ("name",)), method=penalty.NAME if ours else other)


def _companion(companion: Any) -> Use:
    from ..optimizers import COMPANIONS as known

    ours = known.get(companion.NAME) is type(companion)
    name = companion.NAME or type(companion).__name__
    return Use("companion", name, _fields(companion) if ours else {}, method="" if ours else "custom")


def _adapter(config: Any) -> Use:
    from peft import LoraConfig

    from ..adapters.config import SvdAdapterConfig

    if isinstance(config, SvdAdapterConfig):
        lora = {f.name for f in fields(LoraConfig)} - set(PEFT[:4])
        kind, shown = config.METHOD, _fields(config, lora | {"svd_cache_dir"})
    else:
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
        shown = {key: public(getattr(config, key)) for key in PEFT if hasattr(config, key)}
    return Use("adapter", kind, shown | _targets(config.target_modules) if "target_modules" in shown else shown)


def _targets(modules: Any) -> dict[str, str]:
    """PEFT writes every layer out: the last parts of their names say enough."""
    if isinstance(modules, str) or not modules:
        return {"target_modules": public(modules)}
    return {"target_modules": public({str(name).rpartition(".")[2] for name in modules})}


def _training(args: Any, state: Any) -> dict[str, str]:
    size, parts, processes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    batch = f"{size * parts * processes} ({size} per device, {parts} accumulated, {processes} processes)"
    if getattr(args, "max_tokens_per_batch", None):
        batch = f"up to {args.max_tokens_per_batch} tokens per device, {parts} accumulated, {processes} processes"
    found = {"steps": str(state.global_step), "epochs": f"{state.epoch or 0:.4g}", "batch": batch}
    for name in SETTINGS:
        value = getattr(args, name, None)
        if value not in (None, False, "", 0):
            found[name] = public(value).strip("'")
    return found


def _hardware(args: Any) -> str:
    device = args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return f"{args.world_size} x {name}"


def _versions(adapter: bool) -> dict[str, str]:
    from hf_reg import __version__

    names = ("torch", "transformers", "accelerate", *(("peft",) if adapter else ()))
    return {"hf_reg": __version__, "python": platform.python_version()} | {name: version(name) for name in names}


def _history(logs: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    kept = []
    for log in logs:
        entry = {
            key: float(value)
            for key, value in log.items()
            if LOGS.match(key)
            and not is_private(key)
            and isinstance(value, (int, float))
            and not key.endswith(NOT_RESULTS)
        }
        if entry.keys() - {"step", "epoch"}:
            kept.append(entry)
    return kept


def _results(history: list[dict[str, float]], best: int | None) -> tuple[dict[str, Any], str]:
    """The metrics of the evaluation that is this model's, and which one that is."""
    evaluations = [log for log in history if any(key.startswith("eval_") for key in log)]
    if best is not None:
        evaluations = [log for log in evaluations if log.get("step") == best] or evaluations
    if not evaluations:
        return {}, ""
    log = evaluations[-1]
    which = "the best evaluation" if best is not None else "the last evaluation"
    step = f" (step {log['step']:.0f})" if "step" in log else ""
    return {key.removeprefix("eval_"): value for key, value in log.items() if key.startswith("eval_")}, which + step


def _final(history: list[dict[str, float]]) -> dict[str, float]:
    for log in reversed(history):
        if "loss" in log:
            shown = ("loss", "rewards/", "logps/")
            return {key: value for key, value in log.items() if key.startswith(shown) and not math.isnan(value)}
    return {}
