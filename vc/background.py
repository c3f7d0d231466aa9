"""A nursery that may hide in a context manager.

A nursery wraps whatever passes through it in an exception group, also what the block of a context manager
raises. Who writes `async with boot_vm(...)` cannot know about our nurseries and wants his exception as it
was. The rule that makes this possible: tasks started here handle their own failures and raise nothing. If
one does, that is a bug, and the group comes out so that nothing is lost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """Give a nursery for tasks that raise nothing; they are cancelled when the block ends."""
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as exc:
                raised = exc
                raise
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if not _holds_only(group, raised):
            raise
        raised = group.exceptions[0]
    # Outside the handler, so that the exception does not get the group that holds it as its context.
    if raised is not None:
        raise raised


def _holds_only(group: BaseExceptionGroup[BaseException], raised: BaseException | None) -> bool:
    """Whether the nursery's group is nothing but a wrapping around what the block raised."""
    if len(group.exceptions) != 1 or raised is None:
        return False
    only = group.exceptions[0]
    # Of a group, trio makes a new one without the cancellations that were its own.
    return only is raised or (isinstance(only, BaseExceptionGroup) and isinstance(raised, BaseExceptionGroup))
