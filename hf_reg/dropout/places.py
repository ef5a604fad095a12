"""Where a model has dropout of each kind, and where it could have some."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..base import Gate
from ..sites.attention import AttentionSite, find_attention, find_uncovered
from ..sites.ffn import find_ffn, is_fused, mixes_tokens
from ..sites.layers import layer_key, layer_lists
from .added import GATES, AddedDropout
from .code import is_between, is_used


__all__ = ["ACTIVATION", "DROP", "PLAIN", "PROBABILITIES", "Map", "Place", "under"]

DROP = re.compile(r"drop", re.IGNORECASE)
# Layers left out, other noise, and the heads of a task: none of our kinds.
OTHER = re.compile(
    r"layer_?drop|path|classif|head|pool|summary|quantizer|token_drop|connect|lora_|rank_|module_dropout"
)
HEADS = re.compile(r"DropPath|Classif|(LM|Prediction)Head|Pooler|Quantizer|Summary")
PROBABILITIES = re.compile(r"att(n|ention)?_(weights?_|probs?_)?p?drop")
PLAIN = re.compile(r"p?_?drop(out)?(_p|_prob|_rate)?")
ACTIVATION = re.compile(r"act(ivation)?_(fn_)?drop|intermediate_drop")


@dataclass(frozen=True)
class Place:
    """A place of the model's own: `attribute` of `owner` is the rate."""

    kind: str
    path: str
    owner: nn.Module
    attribute: str
    holder: str  # path of the module that uses it

    @property
    def how(self) -> str:
        return "module" if isinstance(self.owner, nn.Dropout) else "number"


def under(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


class Map:
    """Where everything is in one model: its layers, the projections of their FFN, and its own dropout by kind."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: list[AttentionSite] = find_attention(model)
        self.mixers = {site.module for site in self.sites}
        lists = layer_lists(model)
        mixing = [path for path, module in model.named_modules() if module in self.mixers or mixes_tokens(module)]
        keys = [key[-1].rpartition(".")[0] for path in mixing if (key := layer_key(path, lists))]
        self.layers = {f"{p}.{i}": layer for p in dict.fromkeys(keys) for i, layer in enumerate(lists[p])}
        self.downs = {
            site.path: site.module
            for site in find_ffn(model)
            if site.kind == "projection" and any(under(site.path, path) for path in self.layers)
        }
        self.branches: dict[str, nn.Module] = {}  # modules whose output is that of an FFN
        for path, layer in self.layers.items():
            self._find_branches(path, layer)
        self.places = list(self._own_places())

    def _children(self, path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Children that do not mix tokens."""
        for name, child in module.named_children():
            if child not in self.mixers and not mixes_tokens(child) and name not in GATES.values():
                yield f"{path}.{name}", child

    def _find_branches(self, path: str, module: nn.Module) -> None:
        for here, child in self._children(path, module):
            inside = any(under(down, here) for down in self.downs)
            if not inside and not self._fused(child):
                continue
            containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
            if isinstance(child, containers) or any(under(site.path, here) for site in self.sites):
                self._find_branches(here, child)
            else:
                self.branches[here] = child

    def _fused(self, module: nn.Module) -> list[str]:
        return [
            type(m).__name__ for m in module.modules() if is_fused(m) and m not in self.mixers and not mixes_tokens(m)
        ]

    def _own_places(self) -> Iterator[Place]:
        base = getattr(self.model, "base_model", self.model)
        root = next((path for path, module in self.model.named_modules() if module is base), "")
        downs = set(self.downs.values())
        known: set[nn.Module] = set()
        for path, owner in self.model.named_modules():
            if not under(path, root) or isinstance(owner, (nn.Dropout, Gate)) or HEADS.search(type(owner).__name__):
                continue
            inner = {n: c for n, c in owner._modules.items() if isinstance(c, nn.Dropout)}
            names: dict[str, nn.Module] = {
                name: child
                for name, child in inner.items()
                if not isinstance(child, (Gate, AddedDropout)) and child not in known
            }
            known |= set(names.values())
            names |= {n: owner for n, v in vars(owner).items() if DROP.search(n) and type(v) in (int, float)}
            names = {n: o for n, o in names.items() if not OTHER.search(f"{path}.{n}") and is_used(owner, n)}
            mixes = owner in self.mixers or (
                type(owner).__name__.endswith("Attention") and not any(under(s.path, path) for s in self.sites)
            )
            chosen = [n for n in names if PROBABILITIES.match(n)]
            chosen = chosen or [n for n in names if mixes and PLAIN.fullmatch(n)]
            for name, holder in names.items():
                if name in chosen:
                    kind = "attention"
                else:
                    kind = "ffn" if ACTIVATION.match(name) or is_between(owner, name, downs) else "hidden"
                here = f"{path}.{name}" if path else name
                yield Place(kind, here, holder, "p" if holder is not owner else name, path)

    def of(self, kind: str) -> list[Place]:
        return [place for place in self.places if place.kind == kind]

    def missing(self, kind: str) -> dict[str, nn.Module]:
        """Modules that an added dropout has to stand in, by path."""
        added: dict[str, nn.Module] = {}
        for path in self.layers if kind in GATES else ():
            own = [place for place in self.of(kind) if under(place.holder, path)]
            sites = {site.path: site.module for site in self.sites if under(site.path, path)}
            if kind == "ffn" and not own:
                added |= {here: down for here, down in self.downs.items() if under(here, path)}
            elif kind == "hidden":
                added |= sites if not own else {}
                if not any(not any(under(place.holder, site) for site in sites) for place in own):
                    added |= {here: branch for here, branch in self.branches.items() if under(here, path)}
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
            if not any(under(holder, path) for holder in holders) and not (kind == "ffn" and self._fused(layer)):
                found[type(layer).__name__] += 1
        return dict(found)
