"""Linear layers that train other tensors in place of their weight, and look like stock layers all the same.

The class of the layer becomes a subclass of the same name. It owns the trained tensors as `weight_*`, computes
`weight` from them whenever it is asked, and reads and writes state dicts with the stock key `weight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn


__all__ = ["Reparameterized", "Start", "make_dense", "named_layers", "reparameterize"]

Start = dict[str, torch.Tensor]  # what stands in for the weight: `nn.Parameter`s are trained, tensors are kept


class Source(Protocol):
    """What a layer asks for its tensors: a `WeightPatch`."""

    def initial(self, layer: nn.Module, weight: torch.Tensor) -> Start: ...


class Reparameterized(nn.Module):
    """Base of such layers; it stands before `nn.Linear` or `Conv1D` in the class of a layer."""

    PARTS: ClassVar[Mapping[str, type[nn.Module]]] = {}  # children that the layer needs

    source: Source  # the settings from which a weight that is loaded becomes tensors
    bias: nn.Parameter | None
    if not TYPE_CHECKING:

        @property
        def weight(self) -> torch.Tensor:
            """What the stock layer would hold, differentiable. Computed anew: writing into it changes nothing."""
            return self.dense()

    def dense(self) -> torch.Tensor:
        """The weight that the trained tensors make."""
        raise NotImplementedError(f"{type(self).__name__} must define `dense()`.")

    def own(self) -> Start:
        """The tensors in place of the weight, by name."""
        every: Mapping[str, Any] = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in every.items() if name.startswith("weight_")}

    def put(self, start: Mapping[str, torch.Tensor]) -> None:
        """Write values into the tensors that are there: an optimizer keeps its parameters."""
        with torch.no_grad():
            for name, tensor in self.own().items():
                if tensor.dtype == start[name].dtype or isinstance(tensor, nn.Parameter):
                    tensor.copy_(start[name])
                else:
                    self._buffers[name] = start[name].to(tensor.device)

    def take(self, weight: torch.Tensor) -> None:
        """Make the tensors anew from a dense weight; one that they make already changes nothing."""
        tensor = next(iter(self.own().values()))
        if tensor.is_meta:
            raise ValueError("A weight is loaded into a layer that was patched while empty. Patch after loading.")
        weight = weight.detach().to(tensor.device, tensor.dtype)
        with torch.no_grad():
            if not torch.equal(self.dense(), weight):
                self.put(self.source.initial(self, weight))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():  # what makes the weight keeps its precision: only parameters are cast
            new = self._buffers[name]
            if name.startswith("weight_") and old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if any(hasattr(tensor, "full_tensor") for tensor in self.own().values()):
            raise ValueError(
                f"{prefix}weight is made of sharded tensors, which do not fold. Unpatch the model before FSDP2 shards "
                "it, or train with DDP or ZeRO-1 / 2."
            )
        if keep_vars:
            destination[f"{prefix}weight"] = self.dense()
        else:
            with torch.no_grad():
                destination[f"{prefix}weight"] = self.dense().contiguous()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        key = f"{prefix}weight"
        given, parameters = state_dict.get(key), dict(self._parameters)
        try:  # everything but the weight loads as in the stock layer
            for name in self.own().keys() & parameters.keys():
                del self._parameters[name]
            unexpected: list[str] = []
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
            )
            parameters |= self._parameters
        finally:
            self._parameters.clear()  # so that they come back in their order, by which optimizers know them
            self._parameters.update(parameters)
        unexpected_keys += [name for name in unexpected if name != key]
        if given is None:
            missing_keys.append(key)
        elif tuple(given.shape) != tuple(shape := self.dense().shape):
            error_msgs.append(f"size mismatch for {key}: {tuple(given.shape)} in the checkpoint, {tuple(shape)} here.")
        else:
            self.take(given)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, type(self).__bases__, self.__dict__  # the class is made at run time: pickle cannot name it


@cache
def _layer_class(kind: Any, base: Any) -> type[Reparameterized]:
    """A subclass of `base`, a class of linear layers, by its name."""
    return type(base.__name__, (kind, base), {"__module__": base.__module__})


def _blank(kind: type[Reparameterized], base: type[nn.Module]) -> Reparameterized:
    cls = _layer_class(kind, base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def reparameterize(layer: nn.Module, kind: type[Reparameterized], source: Source, start: Start) -> None:
    """Turn a linear layer, in place, into one of `kind` that trains the parameters among `start`."""
    rest = {name: parameter for name, parameter in layer._parameters.items() if name != "weight"}
    layer._parameters.clear()
    layer.__class__ = _layer_class(kind, type(layer))  # type: ignore[arg-type]
    for name, tensor in start.items():
        if isinstance(tensor, nn.Parameter):
            layer.register_parameter(name, tensor)
        else:
            layer.register_buffer(name, tensor, persistent=False)
    layer._parameters.update(rest)
    for name, part in kind.PARTS.items():
        layer.add_module(name, part())
    layer.source = source  # type: ignore[assignment]


def make_dense(layer: Reparameterized) -> Start:
    """Turn `layer`, in place, back into a stock one whose weight is what its tensors make; returns those."""
    start = layer.own()
    trained = any(tensor.requires_grad for tensor in start.values())
    with torch.no_grad():
        weight = nn.Parameter(layer.dense().contiguous().clone(), requires_grad=trained)
    rest = {name: parameter for name, parameter in layer._parameters.items() if name not in start}
    layer._parameters.clear()
    for name in start.keys() & layer._buffers.keys():
        del layer._buffers[name]
        layer._non_persistent_buffers_set.discard(name)
    for name in layer.PARTS:
        del layer._modules[name]
    layer.__class__ = type(layer).__bases__[1]
    layer._parameters.update({"weight": weight, **rest})
    del layer.source
    return start


def named_layers(model: nn.Module) -> Iterator[tuple[str, Reparameterized]]:
    """The layers of `model` that train other tensors than their weight, by path."""
    for path, module in model.named_modules():
        if isinstance(module, Reparameterized):
            yield path, module
