"""A pod: the tasks of the sandbox that this process serves, from the first Create to the last Delete.

What must not stop half-way (start, delete) runs in the pod's nursery, where the caller's hanging up cannot
cancel it. Create is the exception: nobody would delete what a lost client created.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from shim import bundle, stdio_uri
from shim.exits import SIGKILL, Exits
from shim.sandbox import OpenSandbox, PodSandbox, identity_of
from shim.stdio import ProcessIO
from shim.tasks import KILLED_STATUS, LOST_STATUS, CreateRequest, ProcessRecord, State, Stdio, Task, Tasks
from vc import timeline
from vc.config import Config
from vc.errors import AlreadyExists, GuestGone, InvalidArgument, NotFound, VCError, WrongState
from vc.oci import spec as oci
from vc.oci.translate import check_workload
from vc.storage.look import look
from vc.storage.mounts import refuse_mapped_owners
from vc.storage.share import check_root

if TYPE_CHECKING:
    from shim.announce import Announcer
    from vc.container import Container

log = logging.getLogger(__name__)

T = TypeVar("T")

SANDBOX_END_WAIT = (
    5.0  # seconds that a Delete waits for the VM's end; Delete has 10 in all, and it goes on behind
)
EXITS_WAIT = 1.0  # seconds for the exits of a sandbox that was ended by a signal
# Seconds that a container may live on after SIGKILL. A guest takes a moment; one that takes longer hides the
# end or cannot bring it about, and clients, who wait for it without limit, would wait for ever.
KILL_LIMIT = 30.0
OUTPUT_END_WAIT = 1.0  # seconds for what a killed background process has still written
# signal(7): 0 only probes; the others are ignored, or stop or continue, by default.
HARMLESS_SIGNALS = frozenset({0, 17, 18, 19, 20, 21, 22, 23, 28})


class Pod:
    """The tasks of one sandbox. Its methods are the Task API's verbs."""

    def __init__(
        self,
        nursery: trio.Nursery,
        announcer: Announcer,
        *,
        namespace: str,
        open_sandbox: OpenSandbox,
        load_config: Callable[[str | None], Config],
    ) -> None:
        self.tasks = Tasks()
        self.on_unused: Callable[[], None] = lambda: None  # called when the last task has gone
        self._nursery = nursery
        self._announcer = announcer
        self._namespace = namespace
        self._exits = Exits(nursery, announcer, self.tasks)
        self.sandbox = PodSandbox(
            nursery,
            self._exits,
            self.tasks,
            namespace=namespace,
            open_sandbox=open_sandbox,
            load_config=load_config,
        )

    @property
    def in_use(self) -> bool:
        """Whether this process is there for something: a task, or a sandbox that waits for one."""
        return self.tasks.in_use or self.sandbox.kept

    # Create

    async def create(self, request: CreateRequest) -> Task:
        """Make a task, and the sandbox with the first one. On failure nothing of it is left.

        Raises:
            VCError: why not; the text names the thing.
        """
        timeline.mark("create called")
        self.tasks.reserve(request.id)
        try:
            spec = oci.read_spec(Path(request.bundle))
            if not spec.get("process"):
                raise InvalidArgument(f"{request.bundle}/config.json has no process to run")
            identity = identity_of(request, spec)
            # A mistake shall not cost a boot.
            refuse_mapped_owners(request.rootfs)
            await trio.to_thread.run_sync(check_workload, spec, look)
            if not request.rootfs:
                await trio.to_thread.run_sync(check_root, Path(request.bundle, oci.root(spec)[0]))
            # As for an exec, the request decides: containerd's clients may say it there alone.
            spec["process"] = {**spec["process"], "terminal": request.stdio.terminal}
            plan = stdio_uri.plan(request.stdio)
            io = ProcessIO(plan, process_id=request.id, namespace=self._namespace)
            await io.open()
            timeline.mark("request read")
            try:
                container = await self._create_container(request, spec, identity, plan)
            except BaseException:
                await self._abandon(io)
                raise
            owns = identity.role in (oci.Role.SINGLE, oci.Role.SANDBOX)
            return self._add(request, container, io, owns=owns)
        finally:
            self.tasks.release(request.id)
            if not self.in_use:
                await self.sandbox.end(SANDBOX_END_WAIT)
                self.on_unused()

    async def _create_container(
        self, request: CreateRequest, spec: Mapping[str, Any], identity: oci.Identity, plan: stdio_uri.Plan
    ) -> Container:
        sandbox = await self.sandbox.for_container(request, spec, identity)
        # containerd's mounts go onto rootfs; without any, the root is there already, wherever it is.
        root = "rootfs" if request.rootfs else oci.root(spec)[0]
        container = await sandbox.create_container(
            request.id,
            spec,
            rootfs_mounts=request.rootfs,
            rootfs=Path(request.bundle, root),
            stdio=plan.request,
        )
        bundle.write_file(request.bundle, bundle.INIT_PID, str(sandbox.pid))
        return container

    def _add(self, request: CreateRequest, container: Container, io: ProcessIO, *, owns: bool) -> Task:
        running = self.sandbox.running
        pid = running.pid if running is not None else 0
        init = ProcessRecord(request.id, "", request.stdio, pid, io, container.init)
        task = Task(request.id, request.bundle, container, init, owns)
        self.tasks.add(task)
        self._announcer.created(task, request.rootfs)
        self._exits.created(task, init)
        timeline.mark("create answered")
        return task

    async def _abandon(self, io: ProcessIO) -> None:
        with trio.CancelScope(shield=True):  # closes descriptors; a logging program's end is bounded
            await io.close()
            await io.end_logger()

    # The end of all

    async def end(self, limit: float) -> None:
        """End everything, as at a signal: the processes are killed and their exits announced."""
        await self.sandbox.end(limit)
        records = [record for task in self.tasks for record in (*task.execs.values(), task.init)]
        with trio.CancelScope(shield=True):  # bounded by the two waits, and by what `close` waits for
            await self._wait_exited(records)
            for record in records:
                await self._close_io(record)
            await self._wait_exited(records)  # of those whose output nobody took

    async def _wait_exited(self, records: list[ProcessRecord]) -> None:
        with trio.move_on_after(EXITS_WAIT):
            for record in records:
                await record.exited.wait()

    # Start, exec, delete

    async def start(self, task_id: str, exec_id: str) -> ProcessRecord:
        """Run a created process. If it cannot run, it stays created."""
        return await self._finish(partial(self._start, task_id, exec_id))

    async def _start(self, task_id: str, exec_id: str) -> ProcessRecord:
        task = self.tasks.find(task_id)
        record = task.find(exec_id)
        timeline.mark("start called")
        async with record.lock:
            record.expect("started")
            if exec_id:
                await self._start_exec(task, record)
            else:
                await task.container.start()
            if record.exit is not None:  # and that has been announced: nothing may follow it
                raise GuestGone(f"{record.name} ended while it was being started")
            record.state = State.RUNNING
            self._announcer.started(record)
            timeline.mark("start answered")
            self._nursery.start_soon(record.io.run, record.process)
            self._exits.watch(task, record)
        if record.size is not None:
            await self._resize(record, *record.size)
        return record

    async def _start_exec(self, task: Task, record: ProcessRecord) -> None:
        if task.init.state is not State.RUNNING:
            raise WrongState(
                f"{task.init.name} is {task.init.state.name.lower()}, so it runs no {record.name}"
            )
        await record.io.open()
        try:
            await task.container.start_exec(record.exec_id)
        except BaseException:
            await self._close_io(record)
            record.io = record.io.renewed()
            raise

    async def exec(self, task_id: str, exec_id: str, stdio: Stdio, process: dict[str, Any]) -> None:
        """Register a further process; Start runs it."""
        task = self.tasks.find(task_id)
        task.init.expect("given another process")
        if exec_id in task.execs:
            raise AlreadyExists(f"process {exec_id!r} in container {task_id!r} exists")
        plan = stdio_uri.plan(stdio)
        made = task.container.exec(exec_id, {**process, "terminal": stdio.terminal}, plan.request)
        io = ProcessIO(plan, process_id=exec_id, namespace=self._namespace)
        task.execs[exec_id] = ProcessRecord(task_id, exec_id, stdio, task.pid, io, made)
        self._announcer.exec_added(task.execs[exec_id])

    async def delete(self, task_id: str, exec_id: str) -> ProcessRecord:
        """Drop a process that ended or never ran; with init goes the task, and with the last task the VM."""
        return await self._finish(partial(self._delete, task_id, exec_id))

    async def _delete(self, task_id: str, exec_id: str) -> ProcessRecord:
        task = self.tasks.find(task_id)
        record = task.find(exec_id)
        timeline.mark("delete called")
        async with record.lock:
            # Another Delete may have had the lock.
            if self.tasks.find(task_id).find(exec_id) is not record:
                raise NotFound(f"{record.name} was replaced")
            record.expect("deleted")
            if exec_id:
                await self._drop_exec(task, record)
            else:
                await self._drop_task(task)
            self._announcer.deleted(record)
        if not self.in_use:
            self.on_unused()
        return record

    async def _drop_exec(self, task: Task, record: ProcessRecord) -> None:
        record.end(LOST_STATUS, time.time())  # only has an effect if it never ran: its waiters must not hang
        await self._close_io(record)
        del task.execs[record.exec_id]
        try:
            task.container.forget_exec(record.exec_id)
        except VCError as exc:
            # Its end was only supposed, with its container's; it goes when the container does.
            log.debug("%s: %s", record.name, exc)

    async def _drop_task(self, task: Task) -> None:
        self._exits.end_unstarted(task, task.init, KILLED_STATUS)  # only has an effect if it never ran
        for record in list(task.execs.values()):
            record.end(KILLED_STATUS, time.time())
            await self._close_io(record)
        last = task.owns_sandbox or self._is_alone(task)
        if not last:  # else the VM goes, and the container with it
            await self._remove_container(task)
        with trio.move_on_after(OUTPUT_END_WAIT):
            await task.init.io.wait_finished()
        await self._close_io(task.init)
        # Of a group's last two, which leave together, each saw the other until now.
        if last or self._is_alone(task):
            await self.sandbox.end(SANDBOX_END_WAIT)
            timeline.mark("sandbox ended")
            log.info("timeline of %s %s", task.id, timeline.current())
        # Last: once a second Delete finds no task, containerd hangs up, also on the first.
        self.tasks.remove(task.id)

    def _is_alone(self, task: Task) -> bool:
        """Say whether the sandbox is there for this task only."""
        return not (self.sandbox.kept or self.tasks.in_use_beside(task.id))

    async def _remove_container(self, task: Task) -> None:
        try:
            await task.container.delete()
        except VCError:
            # The record goes all the same, or the client could never get rid of it; `delete` comes after us.
            log.exception("%s was not removed cleanly", task.init.name)

    async def _close_io(self, record: ProcessRecord) -> None:
        await record.io.close()
        self._nursery.start_soon(record.io.end_logger)

    # Running processes

    async def kill(self, task_id: str, exec_id: str, signal: int, *, all_processes: bool) -> None:
        """Deliver a signal. A task that was never started has nothing to deliver it to: it ends."""
        task = self.tasks.find(task_id)
        record = task.find(exec_id)
        if record.state is State.STOPPED and all_processes and not exec_id:
            return
        record.expect("killed", task.shown_state(record))
        if record.state is State.CREATED:
            async with record.lock:  # a Start that is under way decides first
                if record.state is State.CREATED:
                    if signal not in HARMLESS_SIGNALS:
                        self._exits.end_unstarted(task, record, 128 + signal)
                    return
        if signal == SIGKILL and not exec_id:
            self._nursery.start_soon(self._expect_end, task)
        try:
            if all_processes and not exec_id:
                await task.container.signal_all(signal)
            else:
                await record.process.signal(signal)
        except GuestGone:
            pass  # nothing is left to be killed, and whoever waits is being told

    async def _expect_end(self, task: Task) -> None:
        """See that a container that was killed ends, if need be by the end of its VM."""
        sandbox = self.sandbox.running
        with trio.move_on_after(KILL_LIMIT):
            await task.init.process.wait()
        frozen = task.init.state in (State.PAUSED, State.PAUSING)  # then it ends when it is resumed
        if sandbox is not None and task.init.process.exit is None and not frozen:
            sandbox.condemn(
                f"the guest did not end {task.init.name} within {KILL_LIMIT:g} s of its being killed"
            )

    async def pause(self, task_id: str) -> None:
        """Freeze a task."""
        task = self.tasks.find(task_id)
        task.init.expect("paused")
        task.init.state = State.PAUSING
        try:
            await task.container.pause()
        except BaseException:
            self._move(task, State.RUNNING)
            raise
        self._move(task, State.PAUSED)
        self._announcer.paused(task)

    async def resume(self, task_id: str) -> None:
        """Thaw a task."""
        task = self.tasks.find(task_id)
        task.init.expect("resumed")
        await task.container.resume()
        self._move(task, State.RUNNING)
        self._announcer.resumed(task)

    def _move(self, task: Task, state: State) -> None:
        """Change the state, unless the task ended meanwhile."""
        if task.init.exit is None:
            task.init.state = state

    async def update(self, task_id: str, resources: Mapping[str, Any]) -> None:
        """Change a task's limits."""
        task = self.tasks.find(task_id)
        task.init.expect("updated")
        await task.container.update(resources)

    async def resize(self, task_id: str, exec_id: str, columns: int, rows: int) -> None:
        """Set the size of a terminal, now or when the process starts."""
        record = self.tasks.find(task_id).find(exec_id)
        if not record.stdio.terminal:
            return
        if exec_id:
            record.expect("resized")
        record.size = (columns, rows)
        if record.state is not State.CREATED:
            await record.process.resize(columns=columns, rows=rows)

    async def _resize(self, record: ProcessRecord, columns: int, rows: int) -> None:
        try:
            await record.process.resize(columns=columns, rows=rows)
        except VCError as exc:
            log.debug("the terminal of %s keeps its size: %s", record.name, exc)

    async def _finish(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something to its end, even if the caller is cancelled meanwhile."""
        done = trio.Event()
        results: list[T] = []
        errors: list[Exception] = []

        async def run() -> None:
            try:
                results.append(await work())
            except Exception as exc:  # the caller's
                errors.append(exc)
            finally:
                done.set()

        self._nursery.start_soon(run)
        await done.wait()
        if errors:
            raise errors[0]
        return results[0]
