"""The properties that every patch must have on every model: the rows of the test matrix, used by test_patches.py and
the sweep.

A property takes a `Case` and returns None when it holds, or a reason why it does not apply; it raises AssertionError
when broken.
"""

from __future__ import annotations

import copy
import io
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_reg import patch_model, unpatch_model
from hf_reg.base import Gate
from hf_reg.patching import known_patches
from hf_reg.seams.attention import gates
from hf_reg.sites.attention import find_attention

from .architectures import Tiny, build, forward, quiet, tensors


# Every method, at a rate at which it cannot be missed; `head_mask` has no default and acts in eval mode by design.
PATCHES: dict[str, dict[str, Any]] = {
    name: {cls.rate_field: 0.5} if cls.rate_field else dict(cls.trial)
    for name, cls in known_patches().items()
    if name != "head_mask"
}


def without_dropout(model: nn.Module) -> nn.Module:
    """Every dropout of the model itself at 0, whether a module or a number, so that only a patch is random."""
    for module in model.modules():
        if isinstance(module, Gate):
            continue
        for owner in (module, getattr(module, "config", None)):
            for name, value in list(vars(owner).items()) if hasattr(owner, "__dict__") else ():
                if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(owner, nn.Dropout))):
                    setattr(owner, name, 0.0)
    return model


def lively(model: nn.Module) -> nn.Module:
    """Weights that are initialised next to zero (BLIP-2: 1e-10) get values with which attention matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and parameter.abs().max() < 1e-2:
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.05)
                elif parameter.abs().max() > 0:  # layer scale
                    parameter.fill_(0.5)
    return model


def reseed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # SpecAugment draws from numpy
    random.seed(seed)


@dataclass
class Case:
    """One model under one patch. `model` is unpatched between properties."""

    model_type: str
    patch: str
    tiny: Tiny
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on_adapters:
            inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), self.tiny.model)
        self.model = lively(without_dropout(self.tiny.model)).train()
        self.settings = self.settings or PATCHES[self.patch]
        self.tolerance = known_patches()[self.patch].tolerance

    @property
    def on_adapters(self) -> bool:
        return known_patches()[self.patch].seam == "rank"

    def attach(self, **settings: Any) -> None:
        patch_model(self.model, self.patch, **(self.settings | settings))

    def run(self, model: nn.Module | None = None, inputs: dict[str, Any] | None = None, seed: int = 0) -> list[Tensor]:
        reseed(seed)
        with torch.no_grad():
            return forward(model or self.model, inputs or self.tiny.inputs)

    def gradients(self, seed: int = 0) -> dict[str, Tensor]:
        reseed(seed)
        self.model.zero_grad()
        outputs = forward(self.model, self.tiny.inputs)
        sum(
            (o.float() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs if o.requires_grad
        ).backward()
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return found

    def identical(self, a: list[Tensor], b: list[Tensor]) -> bool:
        """Equal to the bit, or as near as the patch declares that its start is to the model."""
        return same(a, b) if self.tolerance == 0 else distance(a, b) <= self.tolerance

    def after_a_step(self) -> list[Tensor]:
        """What a copy computes when every parameter has taken a step of one size along its gradient."""
        kept, self.model = self.model, copy.deepcopy(self.model)
        try:
            gradients = self.gradients()
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name in gradients:
                        parameter -= 0.3 * gradients[name] / gradients[name].norm().clamp(min=1e-9)
            return self.run()
        finally:
            self.model = kept


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True)
    )


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference relative to the size of the output; infinite where only one of the two is a number."""
    if any(x.shape != y.shape or not torch.equal(x.isnan(), y.isnan()) for x, y in zip(a, b, strict=True)):
        return float("inf")
    return max(
        ((x - y).abs().max() / y.abs().max().clamp(min=1e-3)).nan_to_num(0).item() if x.numel() else 0.0
        for x, y in zip(a, b, strict=True)
    )


def eval_identical(case: Case) -> str | None:
    case.model.eval()
    before = case.run()
    case.attach()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.no_grad():
        forward(case.model, case.tiny.inputs)
    moved = not torch.equal(state, torch.get_rng_state())
    after = case.run()
    case.model.train()
    assert case.identical(before, after), "eval output differs"
    if moved:  # some models sample in eval mode by themselves
        unpatch_model(case.model)
        case.model.eval()
        torch.manual_seed(3)
        with torch.no_grad():
            forward(case.model, case.tiny.inputs)
        case.model.train()
        assert not torch.equal(state, torch.get_rng_state()), "eval drew random numbers"
    return None


def train_differs(case: Case) -> str | None:
    def attended() -> list[Tensor]:
        """The output of the attention modules."""
        found: list[Tensor] = []
        hooks = [
            site.module.register_forward_hook(lambda module, args, output: found.extend(tensors(output)))
            for site in find_attention(case.model)
        ]
        case.run()
        for hook in hooks:
            hook.remove()
        return found

    if known_patches()[case.patch].replaces_parameters:  # the start is the model: what differs is where a step leads
        before = case.after_a_step()
        case.attach()
        assert distance(before, case.after_a_step()) > 10 * case.tolerance, "training never changes"
        return None
    before, inside = case.run(), attended()
    case.attach()
    if any(not same(before, case.run(seed=seed)) for seed in range(8)):
        return None
    assert not same(inside, attended()), "train output never changes"
    return "the model quantizes or saturates its output; that of its attention modules does change"


def rate_zero_is_identity(case: Case) -> str | None:
    before = case.run()
    case.attach()
    for gate in gates(case.model):
        gate.p = 0.0
    assert case.identical(before, case.run()), "rate 0 changes the output"
    return None


def unpatch_restores(case: Case) -> str | None:
    before, names = case.run(), [name for name, _ in case.model.named_modules()]
    config = getattr(case.model, "config", None)
    settings = config.to_dict() if isinstance(config, PreTrainedConfig) else None
    case.attach()
    if settings is not None:
        assert list(config.hf_reg["patches"]) == [case.patch], "the configuration does not name the patch"
    keys = list(case.model.state_dict())
    assert not any("hf_reg" in key for key in keys), "the state dict shows the patch"
    unpatch_model(case.model)
    assert keys == list(case.model.state_dict()) and names == [name for name, _ in case.model.named_modules()]
    assert settings is None or config.to_dict() == settings, "the configuration is not what it was"
    hooks = [
        hook for m in case.model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    assert not any(type(hook).__module__.startswith("hf_reg") for hook in hooks), "hooks are left"
    assert case.identical(before, case.run()), "unpatching does not restore the output"
    return None


def gradients_kept(case: Case) -> str | None:
    before = case.gradients()
    if not before:
        return "the outputs carry no gradient"
    case.attach()
    after = {re.sub(r"(weight)_[uv]$", r"\1", name): g for name, g in case.gradients().items()}
    lost = [name for name in before.keys() ^ after.keys() if "expert" not in name]  # routing follows the hidden states
    assert not lost, f"gradients lost: {lost[:3]}"
    bad = [
        name
        for name, g in after.items()
        if name in before and not g.isfinite().all() and before[name].isfinite().all()
    ]
    assert not bad, f"gradients not finite: {bad[:3]}"
    return None


def copies_are_independent(case: Case) -> str | None:
    def stored() -> io.BytesIO:
        buffer = io.BytesIO()
        torch.save(case.model, buffer)
        buffer.seek(0)
        return buffer

    try:
        stored()
        picklable = True
    except (AttributeError, TypeError, RuntimeError):  # transformers leaves local functions as hooks on some models
        picklable = False
    case.attach()
    reference = case.run()
    made_ones = [copy.deepcopy(case.model)]
    if picklable:
        made_ones.append(torch.load(stored(), weights_only=False))
    for made in made_ones:
        assert same(reference, case.run(made)), "the copy computes something else"
        unpatch_model(made)
        assert not list(gates(made)) and list(gates(case.model)), "unpatching the copy unpatched the original"
    return None


def second_model_untouched(case: Case) -> str | None:
    torch.manual_seed(0)
    try:
        other = without_dropout(type(case.model)(case.model.config)).train()
    except TypeError as error:
        return f"the config object makes no second model: {str(error)[:60]}"
    before = case.run(other)
    if not same(before, case.run(other)):
        return "the unpatched model does not repeat itself"
    case.attach()
    assert same(before, case.run(other)), "a second model from the same config object changed"
    assert not list(gates(other))
    return None


def reloads_stock(case: Case) -> str | None:
    def difference() -> float:
        case.model.eval()
        with tempfile.TemporaryDirectory() as folder:
            case.model.save_pretrained(folder)
            try:
                loaded = type(case.model).from_pretrained(folder).eval()
            except RuntimeError:
                return float("inf")
        result = distance(case.run(loaded), case.run())
        case.model.train()
        assert not list(gates(loaded)), "the patch came with the checkpoint"
        assert getattr(loaded.config, "hf_reg", None) == getattr(case.model.config, "hf_reg", None), "another block"
        return result

    if case.on_adapters:
        return "adapters are saved apart: test_tensor_dropout.py"
    with quiet():
        case.attach()
        patched = difference()
        if patched > 1e-5:
            unpatch_model(case.model)
            if difference() > 1e-5:
                return "the unpatched model does not reload equally either"
    assert patched <= 1e-5, f"the reloaded checkpoint differs by {patched:.1e}"
    return None


def checkpointing_repeats(case: Case) -> str | None:
    if not case.model.supports_gradient_checkpointing:
        return "no gradient checkpointing"
    enable = getattr(case.model, "activation_checkpointing_enable", case.model.gradient_checkpointing_enable)
    disable = getattr(case.model, "activation_checkpointing_disable", case.model.gradient_checkpointing_disable)

    def difference() -> float:
        plain = case.gradients()
        try:
            enable()
        except ValueError:  # says that it is not compatible
            return float("inf")
        try:
            checkpointed = case.gradients()
        except (RuntimeError, ValueError):
            return float("inf")
        finally:
            disable()
            if hasattr(case.model, "_require_grads_hook"):
                case.model.disable_input_require_grads()
        if plain.keys() != checkpointed.keys():
            return float("inf")
        return max((distance([checkpointed[k]], [plain[k]]) for k in plain), default=0.0)

    with quiet():
        case.attach()
        patched = difference()
        if patched > 1e-3:
            unpatch_model(case.model)
            if difference() > 1e-3:
                return "the unpatched model does not repeat itself either"
    assert patched <= 1e-3, f"gradients differ by {patched:.1e} under checkpointing"
    return None


def routes(case: Case) -> bool:
    """Whether the patch acts behind a router, which hands tokens on in an order that follows their values."""
    outside = known_patches()[case.patch].seam != "attention"
    return outside and any(re.search("MoE|Moe|Expert|Router", type(m).__name__) for m in case.model.modules())


def visibility_respected(case: Case) -> str | None:
    """Padding, causality, windows: a change of one token moves no output that it does not move in the unpatched
    model."""
    ids = case.tiny.inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.long or ids.shape[1] < 4:
        return "no input_ids"
    length = ids.shape[1]
    moved_anything = False
    for position in (0, length // 2, length - 1):
        changed = ids.clone()
        changed[:, position] = torch.where(changed[:, position] == 7, 8, 7)
        inputs = {**case.tiny.inputs, "input_ids": changed}

        def moves() -> list[Tensor]:
            pairs = zip(case.run(), case.run(inputs=inputs), strict=True)  # noqa: B023
            return [
                ((a - b).abs().flatten(2).amax(-1) / a.abs().max().clamp(min=1e-3)).nan_to_num(0)
                for a, b in pairs
                if a.dim() >= 3 and a.shape[:2] == ids.shape
            ]

        try:
            plain = moves()
        except (RuntimeError, ValueError, IndexError):
            continue  # the token is not free (an image placeholder, an end marker)
        if not plain:
            return "no output per token"
        case.attach()
        patched = moves()
        unpatch_model(case.model)
        for other in (9, 11, 13, 17):  # a saturated softmax hides a move of one token, not of several
            if not any(((a == 0) & (b > 1e-5)).any() for a, b in zip(plain, patched, strict=True)):
                break
            changed[:, position] = other
            plain = [torch.maximum(a, b) for a, b in zip(plain, moves(), strict=True)]
        for a, b in zip(plain, patched, strict=True):
            moved_anything |= bool((a > 0).any())
            leaked = (a == 0) & (b > 1e-5)
            if leaked.any() and routes(case):
                return "experts draw for tokens in the order of the routing, which the change moved"
            assert not leaked.any(), f"token {position} reaches {int(leaked.sum())} outputs that it must not reach"
    return None if moved_anything else "no token could be changed"


def backends_agree(case: Case) -> str | None:
    if not any(site.kind == "interface" for site in find_attention(case.model)):
        return "own attention code: one backend"

    def outputs(implementation: str) -> list[Tensor]:
        case.model.set_attn_implementation(implementation)
        return case.run()

    configs = [module.config for module in case.model.modules() if isinstance(module, PreTrainedModel)]
    originals = [config._attn_implementation_internal for config in configs]

    def restore() -> None:
        for config, original in zip(configs, originals, strict=True):
            config._attn_implementation_internal = original

    try:
        plain = distance(outputs("sdpa"), outputs("eager"))
    except (ValueError, RuntimeError) as error:
        restore()
        return f"the unpatched model does not run on both backends: {str(error)[:60]}"
    case.attach()
    patched = distance(outputs("sdpa"), outputs("eager"))
    restore()
    if plain > 1e-3:
        return "the unpatched model differs between sdpa and eager"
    assert patched < 1e-3, f"sdpa and eager differ by {patched:.1e} (unpatched {plain:.1e})"
    return None


PROPERTIES: dict[str, Callable[[Case], str | None]] = {
    function.__name__: function
    for function in (
        eval_identical, train_differs, rate_zero_is_identity, unpatch_restores, gradients_kept, copies_are_independent,
        second_model_untouched, reloads_stock, checkpointing_repeats, visibility_respected, backends_agree,
    )
}  # fmt: skip


def check(case: Case, name: str) -> str | None:
    """Run one property and leave the model unpatched, whatever happens."""
    try:
        with quiet():
            return PROPERTIES[name](case)
    finally:
        unpatch_model(case.model)
        case.model.train()


__all__ = ["PATCHES", "PROPERTIES", "Case", "build", "check"]
