"""What is told to containerd's event service: one method for each topic, and the messages behind them."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from protos.containerd import events_pb2 as events
from shim.events import Publisher
from shim.tasks import Exited, ProcessRecord, Task
from vc.storage.mounts import Mount


def timestamp(at: float) -> Timestamp:
    """Return a time in seconds since the epoch as a message."""
    moment = Timestamp()
    moment.FromNanoseconds(round(at * 1e9))
    return moment


class Announcer:
    """Turns what happens to tasks into events and queues them, in the order of the calls."""

    def __init__(self, publisher: Publisher) -> None:
        self._publish = publisher.publish

    def created(self, task: Task, rootfs: Iterable[Mount]) -> None:
        """A task exists."""
        stdio = task.init.stdio
        event = events.TaskCreate(container_id=task.id, bundle=task.bundle, pid=task.pid)
        event.io.stdin, event.io.stdout, event.io.stderr = stdio.stdin, stdio.stdout, stdio.stderr
        event.io.terminal = stdio.terminal
        for mount in rootfs:
            event.rootfs.add(type=mount.type, source=mount.source, target=mount.target, options=mount.options)
        self._publish("/tasks/create", event)

    def started(self, record: ProcessRecord) -> None:
        """A process runs."""
        if record.exec_id:
            event = events.TaskExecStarted(
                container_id=record.container_id, exec_id=record.exec_id, pid=record.pid
            )
            self._publish("/tasks/exec-started", event)
        else:
            self._publish("/tasks/start", events.TaskStart(container_id=record.container_id, pid=record.pid))

    def exec_added(self, record: ProcessRecord) -> None:
        """A further process is registered."""
        event = events.TaskExecAdded(container_id=record.container_id, exec_id=record.exec_id)
        self._publish("/tasks/exec-added", event)

    def exited(self, record: ProcessRecord, exited: Exited) -> None:
        """A process ended. The id of an init process is its container's."""
        event = events.TaskExit(
            container_id=record.container_id,
            id=record.exec_id or record.container_id,
            pid=record.pid,
            exit_status=exited.status,
            exited_at=timestamp(exited.at),
        )
        self._publish("/tasks/exit", event)

    def deleted(self, record: ProcessRecord) -> None:
        """A process is forgotten. Here the id of an init process is empty."""
        event = events.TaskDelete(container_id=record.container_id, id=record.exec_id, pid=record.pid)
        if record.exit is not None:
            event.exit_status = record.exit.status
            event.exited_at.CopyFrom(timestamp(record.exit.at))
        self._publish("/tasks/delete", event)

    def out_of_memory(self, task: Task) -> None:
        """The guest's kernel killed something in a task for want of memory."""
        self._publish("/tasks/oom", events.TaskOOM(container_id=task.id))

    def paused(self, task: Task) -> None:
        """A task is frozen."""
        self._publish("/tasks/paused", events.TaskPaused(container_id=task.id))

    def resumed(self, task: Task) -> None:
        """A task goes on."""
        self._publish("/tasks/resumed", events.TaskResumed(container_id=task.id))
