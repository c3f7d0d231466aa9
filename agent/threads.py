"""Threads that are reused, and that cannot take the agent down.

Blocking calls in threads are how the agent waits for many things at once: an event loop and its libraries
would cost a second at each boot of an emulated guest. A thread that has finished its work waits for more
for a while, since a new one costs more than a hand-over.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from agent import log
from agent.errors import is_expected

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_IDLE = 8
IDLE_SECONDS = 30.0

_condition = threading.Condition()
_jobs: deque[tuple[str, Callable[..., None], tuple[object, ...]]] = deque()
_idle = 0


def start(name: str, job: Callable[..., None], *args: object) -> None:
    """Run `job(*args)` in a thread, at once. What it raises is logged."""
    with _condition:
        if _idle > len(_jobs):
            _jobs.append((name, job, args))
            _condition.notify()
            return
    threading.Thread(target=_work, args=(name, job, args), daemon=True).start()


def _work(name: str, job: Callable[..., None], args: tuple[object, ...]) -> None:
    global _idle
    while True:
        try:
            job(*args)
        except BaseException as exc:
            if is_expected(exc):
                log.error("thread ended", thread=name, error=exc)
            else:
                log.exception("thread failed", exc, thread=name)
        del job, args  # they may hold a connection
        with _condition:
            if _idle >= MAX_IDLE:
                return
            _idle += 1
            try:
                if not _jobs and not _condition.wait_for(lambda: _jobs, IDLE_SECONDS):
                    return
                name, job, args = _jobs.popleft()
            finally:
                _idle -= 1
