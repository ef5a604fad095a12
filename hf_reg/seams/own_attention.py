"""Attention modules that do not go through transformers' interface, and how their gates are reached all the same.

Two ways, both by hooks on the attention module (nothing is replaced, nothing runs in eval mode):

- `mask_argument`: the module takes a mask that may differ by query and returns its heads concatenated (DeBERTa,
  DeBERTa-v2 / v3, SEW-D). The mask is narrowed on the way in, the heads are scaled on the way out. Compiles in one
  graph.
- `operations`: the module writes its attention out (scores, softmax, probabilities) or calls
  `F.scaled_dot_product_attention`. Those calls are intercepted while its forward runs: the scores lose what a gate
  hides, the probabilities are scaled by head. Does not compile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..sites.attention import count_heads
from .masks import TokenView, narrow_scores


if TYPE_CHECKING:
    from .attention import AttentionSeam


__all__ = ["SeamHook", "connect", "disconnect"]

SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)
_running: list[_Operations] = []


class SeamHook:
    """Base of the hooks that a patch leaves on modules: plain objects, so that copies and pickles of a model own
    theirs."""

    owner: Any = None  # the gate or seam that the hook works for


class NarrowArgument(SeamHook):
    """Forward pre-hook: narrows the mask argument, (B, 1, Tq, Tk) with nonzero = may attend."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seam: AttentionSeam = module._modules["hf_reg"]  # type: ignore[assignment]
        gates = [gate for gate in seam.enabled() if gate.hides]
        if not gates:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        mask = args[1] if len(args) > 1 else kwargs["attention_mask"]
        allowed = mask.bool()
        for gate in gates:
            length = states.shape[1]
            allowed = gate.hide(
                TokenView(allowed.expand(-1, -1, length, -1), states.shape[0], length, length, states.device)
            )
        narrowed = allowed.to(mask.dtype)
        if len(args) > 1:
            return (args[0], narrowed, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": narrowed}


class ScaleOutput(SeamHook):
    """Forward hook: scales the heads of a (B, T, H * D) output."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        seam: AttentionSeam = module._modules["hf_reg"]  # type: ignore[assignment]
        context = output[0] if isinstance(output, tuple) else output
        heads = count_heads(module)
        assert heads is not None
        changed = context
        for gate in seam.enabled():
            if not torch.compiler.is_compiling():
                gate.ran = True
            scales = gate.scales(context.shape[0], heads, context.device)
            if scales is not None:
                changed = (changed.unflatten(-1, (heads, -1)) * scales.to(changed.dtype)[:, None, :, None]).flatten(-2)
        if changed is context:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


class KeepProbabilities(SeamHook):
    """Forward hook on the module's probability dropout: hands its input on while a gate replaces dropout."""

    def __init__(self, seam: AttentionSeam) -> None:
        self.owner = seam

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return args[0] if any(gate.replaces_dropout for gate in self.owner.enabled()) else None


class _Operations(TorchFunctionMode):
    """Intercepts the attention arithmetic of one module while its forward runs."""

    def __init__(self, module: nn.Module, seam: AttentionSeam, heads: int) -> None:
        super().__init__()
        self.module, self.seam, self.heads = module, seam, heads
        self.probabilities: torch.Tensor | None = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAX:
            return self.softmax(func, args, kwargs)
        if func is F.scaled_dot_product_attention:
            return self.scaled_dot_product_attention(*args, **kwargs)
        if func is F.dropout and args and args[0] is self.probabilities:
            if any(gate.replaces_dropout for gate in self.seam.enabled()):
                return args[0]
        return func(*args, **kwargs)

    def softmax(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        scores, rest = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        shape = scores.shape
        four = scores.dim() == 4 and shape[1] == self.heads
        three = scores.dim() == 3 and shape[0] % self.heads == 0
        dim = kwargs.get("dim", rest[0] if rest else None)
        if self.probabilities is not None or not (four or three) or dim not in (-1, scores.dim() - 1):
            return func(scores, *rest, **kwargs)
        grid = scores if four else scores.unflatten(0, (-1, self.heads))
        for gate in self.seam.enabled():
            given = grid
            if gate.hides:
                grid = narrow_scores(gate, given, None)
            if not gate.hides or grid is not given:
                gate.ran = True
        result = func(grid.view(shape), *rest, **kwargs)
        for gate in self.seam.enabled():
            scales = gate.scales(grid.shape[0], self.heads, grid.device)
            if scales is not None:
                scales = scales.to(result.dtype).expand(grid.shape[0], -1)
                result = result * (scales[:, :, None, None] if four else scales.flatten()[:, None, None])
        self.probabilities = result
        return result

    def scaled_dot_product_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        def function(module: Any, query: Any, key: Any, value: Any, mask: Any, dropout: float, is_causal: bool) -> Any:
            causal = is_causal and mask is None
            out = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, **kwargs)
            return out.transpose(1, 2), None

        if query.dim() != 4:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        settings = {"dropout": dropout_p, "is_causal": is_causal}
        output, _ = self.seam.attend(function, "sdpa", self.module, query, key, value, attn_mask, None, settings)
        return output.transpose(1, 2)


class EnterOperations(SeamHook):
    """Forward pre-hook: start intercepting, if any gate is on."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        seam: AttentionSeam = module._modules["hf_reg"]  # type: ignore[assignment]
        heads = count_heads(module)
        if heads is not None and seam.enabled():
            _running.append(_Operations(module, seam, heads).__enter__())


class LeaveOperations(SeamHook):
    """Forward hook, called after an exception as well: stop intercepting."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _running and _running[-1].module is module:
            _running.pop().__exit__(None, None, None)


def connect(module: nn.Module, seam: AttentionSeam, kind: str) -> None:
    """Leave on `module` the hooks that its kind of attention needs; the interface needs none."""
    if kind == "mask_argument":
        module.register_forward_pre_hook(NarrowArgument(), with_kwargs=True)
        module.register_forward_hook(ScaleOutput())
        for child in module.children():
            if isinstance(child, nn.Dropout) and child is getattr(module, "dropout", None):
                child.register_forward_hook(KeepProbabilities(seam))
    elif kind == "operations":
        module.register_forward_pre_hook(EnterOperations())
        module.register_forward_hook(LeaveOperations(), always_call=True)


def disconnect(module: nn.Module, owners: Collection[Any] = ()) -> None:
    """Remove from `module` the hooks of `owners` (none: those without an owner), also on a copied or loaded model."""
    wanted = {id(owner) for owner in owners} or {id(None)}
    for hooks, extras in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, SeamHook) and id(hook.owner) in wanted]:
            del hooks[key]
            for extra in extras:
                extra.pop(key, None)
