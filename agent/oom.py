"""Watching for processes that the kernel kills for want of memory.

One thread waits for all containers. Version 2 tells through poll on `memory.events`; version 1 through an
eventfd that is registered for `memory.oom_control`. Either only says "look": what counts is that `oom_kill`
has gone up.
"""

from __future__ import annotations

import os
import select
import threading
from typing import TYPE_CHECKING

from agent import log, threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.cgroups import Cgroup


class Watch:
    """One container that is watched."""

    def __init__(self, name: str, cgroup: Cgroup) -> None:
        self.name = name
        self.cgroup = cgroup
        self.seen = cgroup.oom_kills()
        self.fds = _open(cgroup)  # the first one is polled

    def close(self) -> None:
        """Close what was opened."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class Watcher:
    """Watches any number of containers; `report` is called with the name of one, once per event."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._watches: dict[str, Watch] = {}
        self._wake: int | None = None

    def add(self, name: str, cgroup: Cgroup) -> None:
        """Begin to watch a container."""
        watch = Watch(name, cgroup)
        with self._lock:
            self._watches[name] = watch
            if self._wake is None:
                self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                threads.start("oom", self._run, self._wake)
            os.eventfd_write(self._wake, 1)

    def check(self, name: str) -> None:
        """Look now: the container has ended, and its cgroup may be gone soon."""
        with self._lock:
            watch = self._watches.get(name)
            fresh = watch is not None and self._changed(watch)
        if fresh:
            self._report(name)

    def remove(self, name: str) -> None:
        """Watch it no longer."""
        with self._lock:
            watch = self._watches.pop(name, None)
            if watch is not None:
                watch.close()
            if self._wake is not None:
                os.eventfd_write(self._wake, 1)

    def _changed(self, watch: Watch) -> bool:
        count = watch.cgroup.oom_kills()
        before, watch.seen = watch.seen, max(count, watch.seen)
        return count > before

    def _run(self, wake: int) -> None:
        while True:
            with self._lock:
                polled = {watch.fds[0]: watch.name for watch in self._watches.values() if watch.fds}
            poll = select.poll()
            poll.register(wake, select.POLLIN)
            for fd in polled:
                # A file of version 2 is always readable and signals with POLLPRI; an eventfd is readable.
                poll.register(fd, select.POLLPRI | (0 if self._is_unified(polled[fd]) else select.POLLIN))
            for fd, _ in poll.poll():
                if fd == wake:
                    _drain(wake)
                elif fd in polled:
                    self._look(polled[fd], fd)

    def _is_unified(self, name: str) -> bool:
        with self._lock:
            watch = self._watches.get(name)
            return watch is not None and watch.cgroup.unified

    def _look(self, name: str, fd: int) -> None:
        with self._lock:
            watch = self._watches.get(name)
            if watch is None or fd not in watch.fds:
                return
            try:
                if watch.cgroup.unified:
                    os.pread(fd, 4096, 0)  # arms the file again
                else:
                    os.read(fd, 8)
            except OSError:  # the cgroup has gone
                watch.close()
        self.check(name)


def _open(cgroup: Cgroup) -> list[int]:
    """Open what can be polled for events of a cgroup; nothing if it cannot be watched."""
    fds: list[int] = []
    try:
        if cgroup.unified:
            path = cgroup.file("memory", "memory.events")
            fds.append(os.open(path or "", os.O_RDONLY | os.O_CLOEXEC))
            os.pread(fds[0], 4096, 0)
            return fds
        control = cgroup.file("memory", "memory.oom_control")
        register = cgroup.file("memory", "cgroup.event_control")
        fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        fds.append(os.open(control or "", os.O_RDONLY | os.O_CLOEXEC))
        with open(register or "", "w", encoding="utf-8") as file:
            file.write(f"{fds[0]} {fds[1]}")
        return fds
    except OSError as exc:
        log.warning("out-of-memory events cannot be watched", error=exc)
        for fd in fds:
            os.close(fd)
        return []


def _drain(fd: int) -> None:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        pass
