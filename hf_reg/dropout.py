"""`set_dropout`: the model's own dropout set by kind, added where it has none, and proof of what drops."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .base import Gate, check_range
from .patching import unwrap
from .sites import OWN, AttentionSite, _layer_key, _layer_lists, find_attention, find_uncovered


__all__ = ["AddedDropout", "DropoutReport", "DropoutRow", "set_dropout"]

GATES = {"hidden": "hf_reg_hidden", "ffn": "hf_reg_ffn"}  # names of the child modules that are added
DROP = re.compile(r"drop", re.IGNORECASE)
# Layers left out, other noise, and the heads of a task: none of our kinds.
OTHER = re.compile(
    r"layer_?drop|path|classif|head|pool|summary|quantizer|token_drop|connect|lora_|rank_|module_dropout"
)
HEADS = re.compile(r"DropPath|Classif|(LM|Prediction)Head|Pooler|Quantizer|Summary")
PROBABILITIES = re.compile(r"att(n|ention)?_(weights?_|probs?_)?p?drop")
PLAIN = re.compile(r"p?_?drop(out)?(_p|_prob|_rate)?")
ACTIVATION = re.compile(r"act(ivation)?_(fn_)?drop|intermediate_drop")
RESIDUAL_FIELD = re.compile(r"(hidden|resid(ual)?|emb(d|ed|edding)?|feat_proj)_p?drop")
FFN = re.compile(r"Mlp|MLP|FeedForward|FFN|Expert")
DOWN = re.compile(r"down_proj|fc2|c_proj|w2|wo|lin2|linear2|dense_4h_to_h", re.IGNORECASE)
DROPPING = (F.dropout, torch.dropout, F.scaled_dot_product_attention, F.multi_head_attention_forward)
PLATFORM = ("torch.", "transformers.modeling_utils", "transformers.generation", "transformers.utils")
FORWARDS = 5  # tries of `verify`: a layer or an expert may be skipped at random in one forward


class AddedDropout(nn.Dropout):
    """Dropout that the model's class does not have, at the output or the input of the module that holds it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if self.training and self.p > 0 else input


class DropOutput:
    """Forward hook: dropout on what a residual branch returns. A plain object: copies and pickles own theirs."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        gate = module._modules[GATES["hidden"]]
        if isinstance(output, torch.Tensor):
            return gate(output)  # type: ignore[misc]
        return (gate(output[0]), *output[1:]) if isinstance(output, tuple) else None  # type: ignore[misc]


class DropInput:
    """Forward pre-hook of a down-projection: dropout on the activation."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (module._modules[GATES["ffn"]](args[0]), *args[1:])  # type: ignore[misc]


@dataclass(frozen=True)
class DropoutRow:
    """One place: a dropout module, a number that a forward passes to a function, or a module that was added."""

    kind: str
    path: str
    rate: float
    how: str  # "module", "number" or "added"
    dropped: bool | None = None  # None: not verified


@dataclass(frozen=True)
class DropoutReport:
    """Where dropout is, by kind. `print` it for a table; a notebook shows it as HTML; `verify` proves it.

    Args:
        model (`nn.Module`): the model.
        rows (sequence of [`DropoutRow`]): every place that was set; what a rate of 0 removed is not among them.
        uncovered (`dict[str, dict[str, int]]`): by kind, classes where dropout cannot be set (fused experts).
    """

    model: nn.Module = field(repr=False, compare=False)
    rows: Sequence[DropoutRow]
    uncovered: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def dropped(self) -> dict[str, tuple[int, int]]:
        """By kind: places seen to drop, and places listed with a rate above 0."""
        on = [row for row in self.rows if row.rate > 0]
        return {
            k: (sum(bool(r.dropped) for r in on if r.kind == k), n) for k, n in Counter(r.kind for r in on).items()
        }

    def verify(self, **inputs: Any) -> DropoutReport:
        """Run the model in training mode and see which places drop; flags and random state come back after it.

        For the time of the forward every place has a rate of its own (they differ by less than a millionth), and
        every call of dropout or of scaled dot-product attention is looked at: a rate that arrives names its place.
        Kernels outside torch's functions (FlashAttention) are not seen.

        Args:
            inputs: what the model is called with, on its device.

        Returns:
            [`DropoutReport`]: this report, with what dropped.

        Raises:
            `RuntimeError`: if a place that is listed with a rate above 0 did not drop.
        """
        marks: dict[float, DropoutRow] = {}
        with _training(self.model), _Recorder() as recorder:
            restore: list[tuple[Any, str, Any]] = []
            try:
                for number, row in enumerate(self.rows):
                    place = _locate(self.model, row)
                    if place is None or not getattr(*place) > 0:
                        continue
                    restore.append((*place, getattr(*place)))
                    mark = float(getattr(*place)) * (1 - (number + 1) * 1e-12)
                    marks[mark] = row
                    setattr(*place, mark)
                for _ in range(FORWARDS):
                    self.model(**inputs)
                    if recorder.rates.issuperset(marks):
                        break
            finally:
                for owner, name, value in restore:
                    setattr(owner, name, value)
        seen = {(row.kind, row.path) for mark, row in marks.items() if mark in recorder.rates}
        result = replace(self, rows=[replace(row, dropped=(row.kind, row.path) in seen) for row in self.rows])
        silent = [f"{row.path} ({row.kind}, {row.rate:g})" for row in result.rows if row.rate > 0 and not row.dropped]
        if silent:
            counts = ", ".join(f"{kind} {done} of {all_}" for kind, (done, all_) in result.dropped.items())
            raise RuntimeError(
                f"{len(silent)} places have a rate above 0 but did not drop: {', '.join(silent[:5])}"
                f"{', ...' if len(silent) > 5 else ''}. Dropped: {counts}. Either these inputs do not reach them, "
                "their rate was changed since set_dropout, or the model or its attention kernel does not use "
                "them: give inputs that run the whole model, call set_dropout again, or leave that kind out."
            )
        return result

    def _table(self) -> Table:
        lines = [
            f"Not covered, {kind}: {', '.join(f'{n} x {name}' for name, n in classes.items())}."
            for kind, classes in self.uncovered.items()
        ]
        table = Table(title=f"Dropout of {type(self.model).__name__}", title_justify="left", caption="\n".join(lines))
        for name in ("kind", "rate", "places", "how", "example", "seen to drop"):
            table.add_column(name, overflow="fold")
        groups: dict[tuple[str, float, str], list[DropoutRow]] = {}
        for row in self.rows:
            groups.setdefault((row.kind, row.rate, row.how), []).append(row)
        for (kind, rate, how), rows in groups.items():
            proof = (
                "not verified" if rows[0].dropped is None else f"{sum(bool(r.dropped) for r in rows)} / {len(rows)}"
            )
            table.add_row(kind, f"{rate:g}", str(len(rows)), how, rows[0].path, proof if rate else "off")
        return table

    def _render(self, **options: Any) -> Console:
        console = Console(record=True, file=io.StringIO(), **options)
        console.print(self._table())
        return console

    def __str__(self) -> str:
        return self._render(width=120).export_text(styles=False).rstrip("\n")

    def _repr_html_(self) -> str:
        return self._render(width=140).export_html(inline_styles=True, code_format="<pre>{code}</pre>")


class _Recorder(TorchFunctionMode):
    """Collects the rates of dropout that arrive at torch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: set[float] = set()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPPING:
            training = kwargs.get("training", kwargs.get("train", True))
            if func in (F.dropout, torch.dropout) and len(args) > 2:
                training = args[2]
            if training:
                self.rates.update(value for value in (*args, *kwargs.values()) if type(value) is float)
        return func(*args, **kwargs)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode without a trace: no gradient, batch norms fixed, flags and random states restored."""
    flags = [(module, module.training) for module in model.modules()]
    used = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in used), "cuda")
    state = np.random.get_state()  # SpecAugment draws from numpy
    fork = torch.random.fork_rng(devices=[device.index for device in used], device_type=kind)
    try:
        with fork, torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.train()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            yield
    finally:
        np.random.set_state(state)
        for module, flag in flags:
            module.training = flag


def _locate(model: nn.Module, row: DropoutRow) -> tuple[nn.Module, str] | None:
    """The object and the attribute that hold the rate of `row`, as the model is now."""
    path, _, name = row.path.rpartition(".") if row.how == "number" else (row.path, "", "p")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return (module, name) if hasattr(module, name) else None


# What the code of a class does with its parts, without running it


class _Uses(ast.NodeVisitor):
    """The attributes of `self` in the order in which a method uses them; a called one after its arguments."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def visit_Call(self, node: ast.Call) -> None:
        own = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", None) == "self"
        for part in (*node.args, *node.keywords) if own else (node.func, *node.args, *node.keywords):
            self.visit(part)
        if own:
            self.names.append(node.func.attr)  # type: ignore[attr-defined]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        if isinstance(node.ctx, ast.Load) and getattr(node.value, "id", None) == "self":
            self.names.append(node.attr)


@functools.cache
def _methods(cls: type[nn.Module]) -> list[list[str]] | None:
    """What each method of `cls` but `__init__` uses of `self`, in order; None if a source cannot be read."""
    found = []
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        function = inspect.unwrap(member) if inspect.isfunction(member) else None
        if function is None or name == "__init__" or function.__module__.startswith(PLATFORM):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):
            return None
        uses = _Uses()
        uses.visit(tree)
        found.append(uses.names)
    return found


def _is_used(owner: nn.Module, name: str) -> bool:
    methods = None if type(owner).__module__.startswith("torch.") else _methods(type(owner))  # type: ignore[arg-type]
    return methods is None or any(name in uses for uses in methods)


def _is_between(owner: nn.Module, name: str, downs: set[nn.Module]) -> bool:
    """Whether `owner` uses `name` between its up- and its down-projection, and not after that as well."""
    linears = {key: child in downs for key, child in owner._modules.items() if child is not None and _widths(child)}
    if not any(linears.values()):
        return False
    sequence = isinstance(owner, nn.Sequential)
    between = after = False
    for uses in [list(owner._modules)] if sequence else _methods(type(owner)) or []:  # type: ignore[arg-type]
        state = ""
        for use in uses:
            if use in linears:
                state = "down" if linears[use] else "up"
            between |= use == name and state == "up" and any(linears.get(u) for u in uses)
            after |= use == name and state == "down"
    return between and not after


# The places of a model


@dataclass(frozen=True)
class _Place:
    """A place of the model's own: `attribute` of `owner` is the rate."""

    kind: str
    path: str
    owner: nn.Module
    attribute: str
    holder: str  # path of the module that uses it

    @property
    def how(self) -> str:
        return "module" if isinstance(self.owner, nn.Dropout) else "number"


def _under(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear layer, PEFT's wrappers and GPT-2's Conv1D included."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear) or (hasattr(module, "base_layer") and hasattr(module, "in_features")):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return None


def _mixes(module: nn.Module) -> bool:
    name = type(module).__name__
    return OWN.search(name) is not None and FFN.search(name) is None


def _is_fused(module: nn.Module) -> bool:
    """Experts in one tensor: two or more parameters (experts, in, out)."""
    sizes = Counter(len(p) for p in module.parameters(recurse=False) if p.dim() == 3 and len(p) > 1)
    return any(count > 1 for count in sizes.values())


class _Map:
    """Where everything is in one model: its layers, the projections of their FFN, and its own dropout by kind."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: list[AttentionSite] = find_attention(model)
        self.mixers = {site.module for site in self.sites}
        lists = _layer_lists(model)
        mixing = [path for path, module in model.named_modules() if module in self.mixers or _mixes(module)]
        keys = [key[-1].rpartition(".")[0] for path in mixing if (key := _layer_key(path, lists))]
        self.layers = {f"{p}.{i}": layer for p in dict.fromkeys(keys) for i, layer in enumerate(lists[p])}
        self.downs: dict[str, nn.Module] = {}
        self.branches: dict[str, nn.Module] = {}  # modules whose output is that of an FFN
        for path, layer in self.layers.items():
            self._find_downs(path, layer)
            self._find_branches(path, layer)
        self.places = list(self._own_places())

    def _children(self, path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Children that do not mix tokens."""
        for name, child in module.named_children():
            if child not in self.mixers and not _mixes(child) and name not in GATES.values():
                yield f"{path}.{name}", child

    def _linears(self, path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, int, int]]:
        for here, child in self._children(path, module):
            widths = _widths(child)
            if widths is not None:
                yield here, child, *widths
            else:
                yield from self._linears(here, child)

    def _find_downs(self, path: str, layer: nn.Module) -> None:
        """Linear layers that undo another's change of width; where both undo each other, names or widths tell."""
        linears = list(self._linears(path, layer))
        pairs = {
            here: (module, wide > narrow)
            for here, module, wide, narrow in linears
            if any(o is not module and i == narrow and out in (wide, 2 * wide) for _, o, i, out in linears)
        }
        named = {here.rpartition(".")[0] for here in pairs if DOWN.fullmatch(here.rpartition(".")[2])}
        for here, (module, narrows) in pairs.items():
            parent, _, name = here.rpartition(".")
            if DOWN.fullmatch(name) or (narrows and parent not in named):
                self.downs[here] = module

    def _find_branches(self, path: str, module: nn.Module) -> None:
        for here, child in self._children(path, module):
            inside = any(_under(down, here) for down in self.downs)
            if not inside and not self._fused(child):
                continue
            containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
            if isinstance(child, containers) or any(_under(site.path, here) for site in self.sites):
                self._find_branches(here, child)
            else:
                self.branches[here] = child

    def _fused(self, module: nn.Module) -> list[str]:
        return [type(m).__name__ for m in module.modules() if _is_fused(m) and m not in self.mixers and not _mixes(m)]

    def _own_places(self) -> Iterator[_Place]:
        base = getattr(self.model, "base_model", self.model)
        root = next((path for path, module in self.model.named_modules() if module is base), "")
        downs = set(self.downs.values())
        known: set[nn.Module] = set()
        for path, owner in self.model.named_modules():
            if not _under(path, root) or isinstance(owner, (nn.Dropout, Gate)) or HEADS.search(type(owner).__name__):
                continue
            inner = {n: c for n, c in owner._modules.items() if isinstance(c, nn.Dropout)}
            names: dict[str, nn.Module] = {
                name: child
                for name, child in inner.items()
                if not isinstance(child, (Gate, AddedDropout)) and child not in known
            }
            known |= set(names.values())
            names |= {n: owner for n, v in vars(owner).items() if DROP.search(n) and type(v) in (int, float)}
            names = {n: o for n, o in names.items() if not OTHER.search(f"{path}.{n}") and _is_used(owner, n)}
            mixes = owner in self.mixers or (
                type(owner).__name__.endswith("Attention") and not any(_under(s.path, path) for s in self.sites)
            )
            chosen = [n for n in names if PROBABILITIES.match(n)]
            chosen = chosen or [n for n in names if mixes and PLAIN.fullmatch(n)]
            for name, holder in names.items():
                if name in chosen:
                    kind = "attention"
                else:
                    kind = "ffn" if ACTIVATION.match(name) or _is_between(owner, name, downs) else "hidden"
                here = f"{path}.{name}" if path else name
                yield _Place(kind, here, holder, "p" if holder is not owner else name, path)

    def of(self, kind: str) -> list[_Place]:
        return [place for place in self.places if place.kind == kind]

    def missing(self, kind: str) -> dict[str, nn.Module]:
        """Modules that an added dropout has to stand in, by path."""
        added: dict[str, nn.Module] = {}
        for path in self.layers if kind in GATES else ():
            own = [place for place in self.of(kind) if _under(place.holder, path)]
            sites = {site.path: site.module for site in self.sites if _under(site.path, path)}
            if kind == "ffn" and not own:
                added |= {here: down for here, down in self.downs.items() if _under(here, path)}
            elif kind == "hidden":
                added |= sites if not own else {}
                if not any(not any(_under(place.holder, site) for site in sites) for place in own):
                    added |= {here: branch for here, branch in self.branches.items() if _under(here, path)}
        return added

    def uncovered(self, kind: str, added: dict[str, nn.Module]) -> dict[str, int]:
        """Classes of modules that should have dropout of `kind` and cannot be given it."""
        holders = [place.holder for place in self.of(kind)] + list(added)
        if kind == "attention":
            found = Counter(type(s.module).__name__ for s in self.sites if s.path not in holders)
            known = {type(self.model.get_submodule(holder)).__name__ for holder in holders}
            others = find_uncovered(self.model, self.sites)
            return dict(found) | {name: count for name, count in others.items() if name not in known}
        found = Counter(find_uncovered(self.model, self.sites)) if kind == "hidden" and added else Counter()
        for path, layer in self.layers.items():
            if kind == "ffn":
                found.update(self._fused(layer))
            if not any(_under(holder, path) for holder in holders) and not (kind == "ffn" and self._fused(layer)):
                found[type(layer).__name__] += 1
        return dict(found)


# Setting


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


def _remove_added(model: nn.Module, kind: str) -> None:
    hook = DropOutput if kind == "hidden" else DropInput
    for module in model.modules():
        if module._modules.pop(GATES[kind], None) is not None:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, one in hooks.items() if isinstance(one, hook)]:
                    del hooks[key]


def _add(module: nn.Module, kind: str, rate: float) -> None:
    module.add_module(GATES[kind], AddedDropout(rate).train(module.training))
    if kind == "hidden":
        module.register_forward_hook(DropOutput())
    else:
        module.register_forward_pre_hook(DropInput())


def _feeds(name: str, others: Sequence[str], places: Sequence[_Place]) -> set[str]:
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


def _sync_config(model: nn.Module, places: Sequence[_Place], kinds: set[str]) -> None:
    """Write the rates into the configuration fields that they come from, where one rate is all that a field feeds."""
    configs: dict[int, tuple[str, PreTrainedConfig]] = {}
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs.setdefault(id(config), (path, config))
    for path, config in configs.values():
        here = [place for place in places if _under(place.path, path)]
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
    map_ = _Map(inner)
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
            _remove_added(inner, kind)
        for path, module in added[kind].items() if rate else ():
            _add(module, kind, rate)
            rows.append(DropoutRow(kind, f"{path}.{GATES[kind]}", rate, "added"))
    _sync_config(inner, map_.places, set(rates))
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if "lora" in rates and isinstance(configs, dict):
            for name in {name for _, _, name in loras} & configs.keys():
                configs[name].lora_dropout = rates["lora"]
    return DropoutReport(inner, rows, {kind: classes for kind, classes in uncovered.items() if classes})
