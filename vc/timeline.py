"""When each step of a pod's start was done: always written, a few numbers long.

A step says `mark("its name")` and knows nothing of who reads that. The marks go to the timeline of the task
that runs, which its tasks and threads inherit; where nobody began one, nothing happens. The rule: marking
costs a clock's reading, never fails, and needs no word about the pod, for nothing of it is in here.
"""

from __future__ import annotations

import time
from contextvars import ContextVar

MAX_MARKS = 64  # a start has some 25; what goes on for ever must not grow


class Timeline:
    """Names of steps with the seconds at which they were done, since `began`."""

    __slots__ = ("_marks", "began")

    def __init__(self, began: float | None = None) -> None:
        """`began` is a reading of the monotonic clock, by default now."""
        self.began = time.monotonic() if began is None else began
        self._marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Note that a step is done. Only the first time counts: a pod's first container is its start."""
        if len(self._marks) < MAX_MARKS:
            self._marks.setdefault(name, time.monotonic() - self.began)

    def marks(self) -> dict[str, float]:
        """Return the steps in the order in which they were done."""
        return dict(self._marks)

    def __str__(self) -> str:
        steps = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self._marks.items())
        return f"since {self.began:.3f}: {steps}"


_current: ContextVar[Timeline | None] = ContextVar("timeline", default=None)


def begin(timeline: Timeline) -> None:
    """Let the marks of this task, and of those that it starts, go to `timeline`."""
    _current.set(timeline)


def current() -> Timeline | None:
    """Return the timeline of this task."""
    return _current.get()


def mark(name: str) -> None:
    """Note a step of the start that this task belongs to."""
    timeline = _current.get()
    if timeline is not None:
        timeline.mark(name)
