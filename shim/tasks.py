"""Tasks and their processes as containerd knows them: records, and the table of what is allowed when.

Nothing here does I/O. A record changes only between two awaits, so whoever reads one sees a whole state. The
end of a process is written once and stays until its Delete, since any number of waiters may come for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import trio

from vc.errors import AlreadyExists, NotFound, WrongState

if TYPE_CHECKING:
    from protos.kata.agent_pb2 import StatsContainerResponse
    from shim.stdio import ProcessIO
    from vc.container import Container
    from vc.process import Process
    from vc.storage.mounts import Mount

KILLED_STATUS = 137  # 128 + SIGKILL
LOST_STATUS = 255  # containerd's word for an exit that nobody saw


class State(IntEnum):
    """Where a process is in its life; the values are containerd's (task_types.proto, Status)."""

    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4
    PAUSING = 5


# In which states an operation on the init process goes ahead. Being killed is all that a pausing task can do
# beside being asked.
INIT_ALLOWED: Mapping[str, frozenset[State]] = {
    "started": frozenset({State.CREATED}),
    "given another process": frozenset({State.CREATED, State.RUNNING}),
    "killed": frozenset({State.CREATED, State.RUNNING, State.PAUSED, State.PAUSING}),
    "paused": frozenset({State.RUNNING}),
    "resumed": frozenset({State.PAUSED}),
    "updated": frozenset({State.CREATED, State.RUNNING, State.PAUSED}),
    "deleted": frozenset({State.CREATED, State.STOPPED}),
}
# The same for an exec. It is shown as paused while its container is, and may be killed then.
EXEC_ALLOWED: Mapping[str, frozenset[State]] = {
    "started": frozenset({State.CREATED}),
    "killed": frozenset({State.RUNNING, State.PAUSED, State.PAUSING}),
    "resized": frozenset({State.CREATED, State.RUNNING, State.PAUSED, State.PAUSING}),
    "deleted": frozenset({State.CREATED, State.STOPPED}),
}


@dataclass(frozen=True, slots=True)
class Stdio:
    """The streams as the client named them; State gives exactly these back."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """A Create, read and checked as far as it can be without the bundle."""

    id: str
    bundle: str
    stdio: Stdio
    rootfs: tuple[Mount, ...]
    config_path: str | None


@dataclass(frozen=True, slots=True)
class Exited:
    """The end of a process."""

    status: int
    at: float  # seconds since the epoch


@dataclass(slots=True, eq=False)
class ProcessRecord:
    """One process of a task; `exec_id` is empty for init."""

    container_id: str
    exec_id: str
    stdio: Stdio
    pid: int
    io: ProcessIO
    process: Process
    state: State = State.CREATED
    exit: Exited | None = None
    size: tuple[int, int] | None = None  # columns and rows, asked for before there was a terminal
    exited: trio.Event = field(default_factory=trio.Event)
    lock: trio.Lock = field(
        default_factory=trio.Lock
    )  # one of start, kill of a created one, delete at a time

    @property
    def name(self) -> str:
        """What error texts call it."""
        if self.exec_id:
            return f"process {self.exec_id!r} of container {self.container_id!r}"
        return f"container {self.container_id!r}"

    def end(self, status: int, at: float) -> bool:
        """Write down the end and wake the waiters; False if it had ended before."""
        if self.exit is not None:
            return False
        self.exit = Exited(status, at)
        self.state = State.STOPPED
        self.exited.set()
        return True

    def expect(self, operation: str, state: State | None = None) -> None:
        """Raise unless the table allows the operation in `state`, which is the record's own if not given.

        Raises:
            NotFound: a process that has ended cannot be killed; clients take this answer for success.
            WrongState: any other forbidden cell.
        """
        state = self.state if state is None else state
        table = EXEC_ALLOWED if self.exec_id else INIT_ALLOWED
        if state in table[operation]:
            return
        if operation == "killed" and state is State.STOPPED:
            raise NotFound(f"{self.name} has ended already: process not found")
        raise WrongState(f"{self.name} is {state.name.lower()}, so it cannot be {operation}")


@dataclass(slots=True, eq=False)
class Task:
    """A container with its processes."""

    id: str
    bundle: str
    container: Container
    init: ProcessRecord
    owns_sandbox: bool
    execs: dict[str, ProcessRecord] = field(default_factory=dict)
    stats: StatsContainerResponse | None = None  # the last that were read
    oom_kills: int = 0  # processes killed for want of memory, as far as clients were told

    @property
    def pid(self) -> int:
        """The task's process as the host sees it: the VMM's."""
        return self.init.pid

    def find(self, exec_id: str) -> ProcessRecord:
        """Return a process; an empty id means init."""
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise NotFound(f"no process {exec_id!r} in container {self.id!r}") from None

    def shown_state(self, record: ProcessRecord) -> State:
        """Return the state that clients see: an exec is paused while its container is."""
        if (
            record.exec_id
            and record.state is State.RUNNING
            and self.init.state in (State.PAUSED, State.PAUSING)
        ):
            return self.init.state
        return record.state


class Tasks:
    """The tasks of a pod by id, those included that are being created."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._creating: set[str] = set()

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._tasks.values()))

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def in_use(self) -> bool:
        """Whether there is a task, or will be if a Create that is under way succeeds."""
        return bool(self._tasks or self._creating)

    def in_use_beside(self, task_id: str) -> bool:
        """Whether there is or will be another task than this one."""
        return bool((self._tasks.keys() | self._creating) - {task_id})

    @property
    def creating(self) -> bool:
        """Whether a Create is under way."""
        return bool(self._creating)

    def reserve(self, task_id: str) -> None:
        """Take an id for a task that is about to be created.

        Raises:
            AlreadyExists: it is in use.
        """
        if task_id in self._tasks or task_id in self._creating:
            raise AlreadyExists(f"task {task_id!r} exists")
        self._creating.add(task_id)

    def release(self, task_id: str) -> None:
        """Give the id back after a Create that ended, well or not."""
        self._creating.discard(task_id)

    def add(self, task: Task) -> None:
        """Make a task known."""
        self._tasks[task.id] = task

    def remove(self, task_id: str) -> None:
        """Forget a task."""
        self._tasks.pop(task_id, None)

    def find(self, task_id: str) -> Task:
        """Return a task. Raises NotFound, also while it is still being created."""
        try:
            return self._tasks[task_id]
        except KeyError:
            raise NotFound(f"no task {task_id!r}") from None
