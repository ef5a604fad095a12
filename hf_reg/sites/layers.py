"""The layers of a model: which list of like modules a path runs through, and the number that users know it by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers.modeling_utils import PreTrainedModel


__all__ = ["DropoutSite", "ProjectionSite", "Site", "layer_key", "layer_lists", "locate", "parent_of"]


@dataclass(frozen=True)
class Site:
    """A module of a model that a patch can act on, and where it stands."""

    module: nn.Module = field(repr=False)
    path: str
    submodel: str  # path of the innermost PreTrainedModel that holds it; "" is the model itself
    submodel_class: str
    layer: int  # index within the sub-model's list of layers
    layers: int  # length of that list


@dataclass(frozen=True)
class ProjectionSite(Site):
    """A place at the input or the output of a linear layer or another leaf: `module`, which is `parent.name`.

    PEFT may put a layer of its own there later: what counts is what `parent` holds under `name`.
    """

    parent: nn.Module = field(repr=False)  # no container: those call, or count, everything that they hold
    name: str  # with dots where a container lies between
    kind: str
    point: str  # "input" or "output"


@dataclass(frozen=True)
class DropoutSite(Site):
    """One dropout that is there. `how` says how it drops: `"module"` (an `nn.Dropout` is called), `"interface"` (an
    attention module hands the rate to its attention function), `"number"` (a forward hands it to a function), or
    `"gate"` (of another patch). Outside of the layers (embeddings) it counts as of the first one."""

    kind: str  # "attention", "hidden" or "ffn"
    how: str
    owner: nn.Module = field(repr=False)
    attribute: str  # of `owner`: the rate
    rate: float  # its own, without what is on it already
    attention: Site | None = field(repr=False)  # of an "interface"


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The innermost module above `path` with a forward of its own, and the path from there."""
    above, _, name = path.rpartition(".")
    while isinstance(parent := model.get_submodule(above), (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        above, _, last = above.rpartition(".")
        name = f"{last}.{name}"
    return parent, name


Lists = Mapping[str, "nn.ModuleList | nn.Sequential"]


def layer_lists(model: nn.Module) -> Lists:
    """The lists of modules, by path; a Sequential is one if its elements are of one class, and no leaves."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.ModuleList) and len(module))
        or (
            isinstance(module, nn.Sequential)
            and len({type(element) for element in module}) == 1
            and next(module[0].children(), None) is not None
        )
    }


def layer_key(path: str, lists: Lists) -> tuple[str, ...]:
    """The path of the layer that holds `path`: the names of the lists' elements from the outermost to the one taken.

    The innermost list of like modules is the list of layers (Swin: the blocks of a stage); a list of unlike modules,
    such as the sub-layers of a T5 block, counts only when there is no other.
    """
    parts = path.split(".")
    on_path = [
        ".".join(parts[:i]) for i in range(1, len(parts)) if ".".join(parts[:i]) in lists and parts[i].isdigit()
    ]
    alike = [name for name in on_path if len({type(element) for element in lists[name]}) == 1]
    if alike:
        on_path = on_path[: on_path.index(alike[-1]) + 1]
        on_path = [name for name in on_path if name in alike]
    else:
        on_path = on_path[:1]
    return tuple(f"{name}.{parts[len(name.split('.'))]}" for name in on_path)


def locate(
    model: nn.Module,
    paths: Sequence[str],
    lists: Lists,
    within: Sequence[str] | None = None,
) -> list[tuple[str, str, int, int]]:
    """For each path: its sub-model, the class of that, the number of its layer, and how many there are.

    Args:
        model (`nn.Module`): what the paths are in.
        paths (sequence of `str`): in the order of `named_modules`.
        lists (`dict`): of [`layer_lists`].
        within (sequence of `str`, *optional*): for each path the path whose layer counts (that of a list of experts).
    """
    pretrained = {
        name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, PreTrainedModel)
    }
    numbered: dict[str, dict[tuple[str, ...], int]] = {}
    single: dict[tuple[str, ...], int] = {}
    rows = []
    for path, inside in zip(paths, within or paths, strict=True):
        submodel = max((name for name in pretrained if not name or path.startswith(f"{name}.")), key=len, default="")
        key = layer_key(inside, lists) or (inside,)
        order = numbered.setdefault(submodel, {})
        order.setdefault(key, len(order))
        if (
            len(key) == 1 and key[0] != inside
        ):  # one plain list: the index users see in the model is the layer's number
            single[key] = int(key[0].rsplit(".", 1)[1])
        rows.append((submodel, key))
    found = []
    for submodel, key in rows:
        keys = numbered[submodel]
        plain = len({k[0].rsplit(".", 1)[0] for k in keys}) == 1 and all(k in single for k in keys)
        layer = single[key] if plain else keys[key]
        total = len(lists[key[0].rsplit(".", 1)[0]]) if plain else len(keys)
        found.append((submodel, pretrained.get(submodel, type(model).__name__), layer, total))
    return found
