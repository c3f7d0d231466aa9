"""The Task service, versions 2 and 3: from containerd's messages to the pod's verbs and back.

The two versions have the same messages under two names and thus the same bytes, so version 2's serve for
both. Nothing is decided here but what only concerns messages; errors get their status in `errors`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import trio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from protos.containerd import task_v2_pb2 as api
from protos.containerd.runc_options_pb2 import ProcessDetails
from shim import logs, metrics, options
from shim.announce import timestamp
from shim.bundle import bundle_dir
from shim.pod import Pod
from shim.tasks import CreateRequest, Exited, ProcessRecord, State, Stdio, Task
from ttrpc.server import Context
from vc.errors import InvalidArgument, NotFound, Unsupported, VCError
from vc.oci.spec import check_id
from vc.storage.mounts import Mount

RESOURCES_TYPE = "LinuxResources"  # the last word of the type under which containerd sends limits


class TaskService:
    """The handlers; the RPC server finds them by the names of their methods."""

    def __init__(self, pod: Pod, *, unified_cgroups: bool, stop: Callable[[], None]) -> None:
        """`stop` makes this process end in order."""
        self._pod = pod
        self._unified_cgroups = unified_cgroups
        self._stop = stop

    def _find(self, request: api.StateRequest | api.WaitRequest | api.CloseIORequest) -> ProcessRecord:
        return self._pod.tasks.find(request.id).find(request.exec_id)

    async def state(self, request: api.StateRequest, context: Context) -> Message:
        """Say where a process is in its life. Never asks the guest."""
        task = self._pod.tasks.find(request.id)
        record = task.find(request.exec_id)
        response = api.StateResponse(
            id=request.exec_id or request.id,
            bundle=task.bundle,
            pid=record.pid,
            status=_status(task.shown_state(record)),
            stdin=record.stdio.stdin,
            stdout=record.stdio.stdout,
            stderr=record.stdio.stderr,
            terminal=record.stdio.terminal,
        )
        if record.exit is not None:
            response.exit_status = record.exit.status
            response.exited_at.CopyFrom(timestamp(record.exit.at))
        return response

    async def create(self, request: api.CreateTaskRequest, context: Context) -> Message:
        """Make a task, and the pod's sandbox with the first one."""
        if request.checkpoint:
            raise Unsupported("restoring from a checkpoint is not supported")
        wanted = CreateRequest(
            id=check_id(request.id, "task id"),
            bundle=bundle_dir(request.bundle),
            stdio=_stdio(request),
            rootfs=tuple(Mount(m.type, m.source, m.target, tuple(m.options)) for m in request.rootfs),
            config_path=options.config_path(request.options),
        )
        task = await self._pod.create(wanted)
        return api.CreateTaskResponse(pid=task.pid)

    async def start(self, request: api.StartRequest, context: Context) -> Message:
        """Run a created process."""
        record = await self._pod.start(request.id, request.exec_id)
        return api.StartResponse(pid=record.pid)

    async def delete(self, request: api.DeleteRequest, context: Context) -> Message:
        """Forget a process that has ended; with init, release everything of the task."""
        record = await self._pod.delete(request.id, request.exec_id)
        response = api.DeleteResponse(pid=record.pid)
        if record.exit is not None:
            response.exit_status = record.exit.status
            response.exited_at.CopyFrom(timestamp(record.exit.at))
        return response

    async def pids(self, request: api.PidsRequest, context: Context) -> Message:
        """List the processes. All have the VMM's pid: that is what there is of them on the host.

        Never empty for a task that exists: containerd takes that for a leaked shim when it restarts.
        """
        task = self._pod.tasks.find(request.id)
        response = api.PidsResponse()
        response.processes.add(pid=task.pid)
        for record in task.execs.values():
            if record.state is State.RUNNING:
                details = ProcessDetails(exec_id=record.exec_id)
                response.processes.add(pid=record.pid, info=_any(details))
        return response

    async def pause(self, request: api.PauseRequest, context: Context) -> None:
        """Freeze a task."""
        await self._pod.pause(request.id)

    async def resume(self, request: api.ResumeRequest, context: Context) -> None:
        """Thaw a task."""
        await self._pod.resume(request.id)

    async def checkpoint(self, request: api.CheckpointTaskRequest, context: Context) -> None:
        """Refuse: a VM's state cannot be written in the form that runc's checkpoints have."""
        self._pod.tasks.find(request.id)
        raise Unsupported("checkpoints of tasks are not supported")

    async def kill(self, request: api.KillRequest, context: Context) -> None:
        """Send a signal; the answer does not wait for the death."""
        await self._pod.kill(request.id, request.exec_id, request.signal, all_processes=request.all)

    async def exec(self, request: api.ExecProcessRequest, context: Context) -> None:
        """Register a further process. The type of its spec says nothing: it is JSON."""
        if not request.exec_id:
            raise InvalidArgument(f"exec in container {request.id!r}: the exec id is empty")
        process = _json(request.spec, f"spec of process {request.exec_id!r}")
        await self._pod.exec(request.id, request.exec_id, _stdio(request), process)

    async def resize_pty(self, request: api.ResizePtyRequest, context: Context) -> None:
        """Set the size of a process's terminal; without a terminal nothing happens."""
        await self._pod.resize(request.id, request.exec_id, request.width, request.height)

    async def close_io(self, request: api.CloseIORequest, context: Context) -> None:
        """End stdin. What the request's flag says is ignored, as everywhere."""
        self._find(request).io.close_stdin()

    async def update(self, request: api.UpdateTaskRequest, context: Context) -> None:
        """Change a task's limits."""
        if not request.resources.type_url.endswith(RESOURCES_TYPE):
            raise InvalidArgument(
                f"update of {request.id!r}: resources of type {request.resources.type_url!r}"
                f" are not supported: expected {RESOURCES_TYPE}"
            )
        await self._pod.update(request.id, _json(request.resources, "resources"))

    async def wait(self, request: api.WaitRequest, context: Context) -> Message:
        """Answer when a process has ended, to everyone who asks, before or after."""
        record = self._find(request)
        await record.exited.wait()
        ended = _ended(record)
        return api.WaitResponse(exit_status=ended.status, exited_at=timestamp(ended.at))

    async def stats(self, request: api.StatsRequest, context: Context) -> Message:
        """Return a task's counters, the last ones after its end."""
        task = self._pod.tasks.find(request.id)
        await self._read_stats(task)
        if task.stats is None:
            raise NotFound(f"there are no counters of container {task.id!r}")
        found = metrics.metrics(task.stats, unified=self._unified_cgroups, oom_kills=task.oom_kills)
        return api.StatsResponse(stats=found)

    async def _read_stats(self, task: Task) -> None:
        """Read fresh counters. Where there are none, what was read before must do: a client may want it."""
        try:
            task.stats = await task.container.stats()
        except VCError:
            if task.stats is None and task.init.exit is None:
                raise

    async def connect(self, request: api.ConnectRequest, context: Context) -> Message:
        """Name this process and the task's; an unknown id is no error.

        It is the first call of a containerd that has come back, and by then it reads our log.
        """
        logs.flush()
        try:
            pid = self._pod.tasks.find(request.id).pid
        except NotFound:
            pid = 0
        return api.ConnectResponse(shim_pid=os.getpid(), task_pid=pid)

    async def shutdown(self, request: api.ShutdownRequest, context: Context) -> None:
        """End this process if it is there for nothing. Answer first: hanging up looks like a crash."""
        if not self._pod.in_use:
            context.after_reply(self._stop)
        await trio.lowlevel.checkpoint()


def _status(state: State) -> Any:
    """Return a state as the enum of the messages, which has the same values."""
    return int(state)


def _ended(record: ProcessRecord) -> Exited:
    assert record.exit is not None
    return record.exit


def _stdio(request: api.CreateTaskRequest | api.ExecProcessRequest) -> Stdio:
    return Stdio(request.stdin, request.stdout, request.stderr, request.terminal)


def _json(value: AnyMessage, what: str) -> dict[str, Any]:
    """Return the JSON object in a value; `what` stands in front of errors."""
    try:
        found = json.loads(value.value)
    except (ValueError, RecursionError) as exc:
        raise InvalidArgument(f"{what} is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise InvalidArgument(f"{what} is no JSON object")
    return found


def _any(message: Message) -> AnyMessage:
    """Pack a message under its bare name, as containerd compares it."""
    return AnyMessage(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())
