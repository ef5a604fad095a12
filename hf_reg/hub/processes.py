"""One of several processes does it, and all know how it went."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from .errors import PushError


__all__ = ["from_main_process"]

TOLD = (PushError, TypeError, ValueError)  # the others are told of as RuntimeError
PATIENCE = timedelta(days=2)

First = TypeVar("First")
Result = TypeVar("Result")


def from_main_process(everywhere: Callable[[], First], then: Callable[[First], Result]) -> Result:
    """What `then` makes, on the first process, of what `everywhere` returns there; the same result on all."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return then(everywhere())
    distributed.barrier()  # a process that is not here at all is missed within the usual time
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)  # to wait for as long as an upload takes
    try:
        first = _attempt(everywhere, group)
        result = _attempt(lambda: then(first) if distributed.get_rank() == 0 else None, group)
        told = [result]
        distributed.broadcast_object_list(told, src=0, group=group)
        return told[0]  # type: ignore[return-value]
    finally:
        distributed.destroy_process_group(group)


def _attempt(action: Callable[[], Result], group: Any) -> Result:
    """What `action` returns, if it does on every process; a failure is told before it is raised: the others wait."""
    distributed: Any = sys.modules["torch.distributed"]
    result, failure = None, None
    try:
        result = action()
    except BaseException as error:
        failure = error
    told: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, _retold(failure), group=group)
    found = failure or next((one for one in told if one is not None), None)
    if found is not None:
        raise found
    return result  # type: ignore[return-value]


def _retold(failure: BaseException | None) -> Exception | None:
    """A failure as it can be sent to other processes."""
    if failure is None:
        return None
    if type(failure) in TOLD:
        return failure  # type: ignore[return-value]
    rank = sys.modules["torch.distributed"].get_rank()
    return RuntimeError(f"Process {rank} failed: {type(failure).__name__}: {failure}")
