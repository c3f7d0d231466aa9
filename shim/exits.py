"""How processes end: each exit is written down once, visible before it is announced, and in order.

A process's exit is reported after its start was announced and after its output has reached the client; the
exits of execs before init's. When the sandbox is over, by its death or at our order, every process has ended,
whatever its own wait says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import trio

from shim import bundle
from shim.tasks import KILLED_STATUS, Exited, ProcessRecord, State, Task, Tasks
from vc import timeline
from vc.errors import VCError
from vc.process import Exit

if TYPE_CHECKING:
    from shim.announce import Announcer

log = logging.getLogger(__name__)

EXEC_GRACE = 2.0  # seconds that execs get to end after their container's init process has
STATS_LIMIT = 1.0  # seconds for the last counters of a killed container
SIGKILL = 9


class Exits:
    """Watches the processes of a pod's tasks, in the nursery that it is given."""

    def __init__(self, nursery: trio.Nursery, announcer: Announcer, tasks: Tasks) -> None:
        self._nursery = nursery
        self._announcer = announcer
        self._tasks = tasks
        self._over = trio.Event()
        self._cause = ""

    def sandbox_opened(self) -> None:
        """A sandbox runs from now on."""
        self._over = trio.Event()

    def sandbox_over(self, cause: str) -> None:
        """No process runs any more. The first cause stays."""
        if self._over.is_set():
            return
        self._cause = cause
        self._over.set()
        for task in self._tasks:
            for record in (*task.execs.values(), task.init):
                if record.state is State.CREATED:
                    self.end_unstarted(task, record, KILLED_STATUS)

    def created(self, task: Task, record: ProcessRecord) -> None:
        """A process was created; it ends at once if the sandbox did meanwhile."""
        if self._over.is_set():
            self.end_unstarted(task, record, KILLED_STATUS)

    def end_unstarted(self, task: Task, record: ProcessRecord, status: int) -> None:
        """End a process that never ran. Of an exec nobody is told but who waits: it was never started."""
        if record.exec_id:
            record.end(status, time.time())
        else:
            self._report(task, record, Exit(status, time.time()))

    def watch(self, task: Task, record: ProcessRecord) -> None:
        """Report the exit of a process that was announced as started."""
        self._nursery.start_soon(self._watch, task, record)

    async def _watch(self, task: Task, record: ProcessRecord) -> None:
        ended: Exit | None = None
        try:
            ended = await self._wait(record)
            timeline.mark("process ended")
            if ended.cause:
                log.warning("%s ended with status %d: %s", record.name, ended.status, ended.cause)
            record.io.process_ended()
            await record.io.wait_copied(ended.stdout_bytes, ended.stderr_bytes)
            if not record.exec_id:
                await self._end_execs(task)
            if ended.status == KILLED_STATUS:
                await self._read_stats(task)
        except Exception:  # a bug, but an exit that nobody tells would be waited for without end
            log.exception("watching %s failed", record.name)
        if ended is None:
            ended = Exit(KILLED_STATUS, time.time())
        self._report(task, record, ended)
        timeline.mark("exit told")
        if task.owns_sandbox and not record.exec_id:
            await self._end_other_tasks(task)

    async def _wait(self, record: ProcessRecord) -> Exit:
        """Wait for the process, or for the end of the sandbox, which is the end of the process too."""
        found: list[Exit] = []
        async with trio.open_nursery() as nursery:

            async def wait_over() -> None:
                await self._over.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_over)
            found.append(await record.process.wait())
            nursery.cancel_scope.cancel()
        return found[0] if found else Exit(KILLED_STATUS, time.time(), self._cause)

    def _report(self, task: Task, record: ProcessRecord, ended: Exit) -> None:
        """Make an exit visible, wake the waiters, then announce it."""
        if record.end(ended.status, ended.at):
            assert record.exit is not None
            if not record.exec_id:
                _note(task, record.exit)
            self._announcer.exited(record, record.exit)

    async def _end_execs(self, task: Task) -> None:
        """Have the execs end before their init process does: killed if need be, given up after a while."""
        for record in task.execs.values():
            if record.state is State.CREATED:
                self.end_unstarted(task, record, KILLED_STATUS)
        running = [record for record in task.execs.values() if record.exit is None]
        with trio.move_on_after(EXEC_GRACE):
            for record in running:
                try:
                    await record.process.signal(SIGKILL)
                except VCError:
                    pass  # it is ending already, or the guest is
            for record in running:
                await record.exited.wait()
        for record in running:
            self._report(task, record, Exit(KILLED_STATUS, time.time(), "its container ended"))

    async def memory_ran_out(self, task: Task) -> None:
        """The guest says that something in a task was killed for want of memory: tell it once."""
        await self._read_stats(task)
        if "oom_kill" not in _memory_counters(task):  # no guest of ours: its word is all there is
            self._tell_oom_kills(task, task.oom_kills + 1)

    def host_memory_ran_out(self) -> None:
        """The VM was killed for want of memory on the host: whatever ran in it was."""
        for task in self._tasks:
            if task.init.state in (State.RUNNING, State.PAUSED):
                self._tell_oom_kills(task, task.oom_kills + 1)

    async def _read_stats(self, task: Task) -> None:
        """Read the counters, and tell if they say that something was killed for want of memory.

        The guest's word for that comes by another way than the exit of what was killed, maybe later. Clients
        want it earlier, and ask for the counters of a container that was killed.
        """
        with trio.move_on_after(STATS_LIMIT):
            try:
                task.stats = await task.container.stats()
            except VCError as exc:
                log.debug("no last counters of %s: %s", task.init.name, exc)
        self._tell_oom_kills(task, _memory_counters(task).get("oom_kill", 0))

    def _tell_oom_kills(self, task: Task, count: int) -> None:
        if count > task.oom_kills:
            task.oom_kills = count
            self._announcer.out_of_memory(task)

    async def _end_other_tasks(self, owner: Task) -> None:
        """With the sandbox's own container the pod ends, so nobody may wait for the others for ever."""
        for task in self._tasks:
            if task is owner or task.init.exit is not None:
                continue
            if task.init.state is State.CREATED:
                self.end_unstarted(task, task.init, KILLED_STATUS)
                continue
            try:
                await task.container.signal_all(SIGKILL)
            except VCError as exc:
                log.debug("%s cannot be killed with its pod: %s", task.init.name, exc)


def _note(task: Task, ended: Exited) -> None:
    """Leave an exit where `delete` finds it: containerd is told by that alone if we die before our Delete."""
    try:
        bundle.write_exit(task.bundle, ended.status, ended.at)
    except OSError as exc:
        log.debug("the exit of %s is known to this process alone: %s", task.init.name, exc)


def _memory_counters(task: Task) -> Mapping[str, int]:
    return task.stats.cgroup_stats.memory_stats.stats if task.stats is not None else {}
