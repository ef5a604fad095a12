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
    result, failure = None, None
    try:
        first = everywhere()
        if distributed.get_rank() == 0:
            result = then(first)
    except BaseException as error:  # told before it is raised: the others wait
        failure = error
    told: list[Any] = [result, _retold(failure)]
    distributed.broadcast_object_list(told, src=0, group=group)
    distributed.destroy_process_group(group)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise told[1]
    return told[0]


def _retold(failure: BaseException | None) -> Exception | None:
    """A failure as it can be sent to another process."""
    if failure is None:
        return None
    if type(failure) in TOLD:
        return failure  # type: ignore[return-value]
    return RuntimeError(f"The first process failed: {type(failure).__name__}: {failure}")
