"""Where everything is: SIGUSR2 writes it into the log, for whoever looks into something that hangs.

SIGUSR1 does with less (faulthandler, the threads alone) and so works also when the event loop does not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import trio

from shim.pod import Pod

log = logging.getLogger(__name__)

MAX_LINES = 500  # of the guest's, which is not to be trusted


async def write(pod: Pod) -> None:
    """Log the tasks of this process with what they wait for, and the same of the guest."""
    root = trio.lowlevel.current_root_task()
    for line in _tasks(root, 0) if root is not None else ():
        log.warning("%s", line)
    for record in (record for task in pod.tasks for record in (task.init, *task.execs.values())):
        log.warning(
            "%s is %s, and for the guest %s", record.name, record.state.name, record.process.state.value
        )
    for line in (await pod.sandbox.guest_stacks()).splitlines()[:MAX_LINES]:
        log.warning("guest: %s", line)


def _tasks(task: trio.lowlevel.Task, depth: int) -> Iterator[str]:
    yield f"task {'  ' * depth}{task.name}: {' > '.join(_places(task.coro))}"
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _tasks(child, depth + 1)


def _places(coroutine: Any) -> Iterator[str]:
    """Yield file and line of each frame of a coroutine, the outermost first; only our own and the last."""
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
        if frame is None:
            return
        yield f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}:{frame.f_code.co_name}"
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
