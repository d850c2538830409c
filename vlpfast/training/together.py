"""What the processes of a run do together: the outcome is known to all, so that none waits for one that has failed.

Without a process group there is one process, and everything here is a plain call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from vlpfast.types import PeerError, UserError

T = TypeVar("T")


def has_peers() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if has_peers() else 0


def on_all(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Runs function in every process -> the results of all (small, picklable), by rank, in each.

    Where it fails, its own error is raised; everywhere else then a PeerError with that rank and reason.
    """
    if not has_peers():
        return [function()]
    result: Any = None
    failure: BaseException | None = None
    try:
        result = function()
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        failure = error
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (result, None if failure is None else reason(failure)), group=group)
    if failure is not None:
        raise failure
    for index, (_, why) in enumerate(outcomes):
        if why is not None:
            raise PeerError(f"process {index}: {why}")
    return [result for result, _ in outcomes]


def on_first(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs function in process 0 alone -> its result (small, picklable) in each. What it raises is a PeerError in the others."""
    if not has_peers():
        return function()
    outcome: list[Any] = [None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [(function(), None)]
        except Exception as error:
            failure = error
            outcome = [(None, reason(error))]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if failure is not None:
        raise failure
    result, why = outcome[0]
    if why is not None:
        raise PeerError(why)
    return result


def reason(error: BaseException) -> str:
    """The system's words (no space left on device), which torch reports as the context of an error of its own."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, CheckpointException):
        named = [f"process {index}: " if has_peers() else "" for index in error.failures]
        return "; ".join(name + reason(failure[0]) for name, failure in zip(named, error.failures.values(), strict=True))
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return next(iter(str(error).splitlines()), "") or type(error).__name__
