"""The serving process: what runs in it, and in which order it ends.

    publisher, signals            end last, so that the last events still leave
      tasks of the pod            sandbox, stdio copies, exit watches
        RPC server, idle watch

It ends when Shutdown finds no task, at SIGTERM or SIGINT, or when nobody can want anything of it any more.
That containerd goes away ends nothing: it comes back and finds the pods as they were.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from protos.containerd import sandbox_pb2, task_v2_pb2, task_v3_pb2
from shim import address, errors, logs, report
from shim.announce import Announcer
from shim.args import Args
from shim.bundle import LOG_FIFO
from shim.events import Publisher
from shim.metrics import host_is_unified
from shim.pod import Pod
from shim.sandbox import OpenSandbox
from shim.sandbox_service import SandboxService
from shim.service import TaskService
from ttrpc.server import PeerCredentials, Server, peer_credentials
from vc import timeline
from vc.config import Config, load
from vc.sandbox import open_sandbox

log = logging.getLogger(__name__)

EVENTS_LIMIT = 2.0  # seconds for the last events: less than `delete` gives us to end in
END_LIMIT = 10.0  # seconds for the sandbox's end at a signal
BUNDLE_INTERVAL = 1.0  # seconds
# Seconds without task and connection: whoever started us has gone before it made use of us.
IDLE_LIMIT = 300.0
SERVED_LIMIT = 5.0  # seconds from the last task's end to the Shutdown or Create that must follow


def main(
    args: Args,
    *,
    path: str,
    bundle: str,
    listener: int,
    events: str,
    given: bytes,
    notes: Sequence[str],
    began: float | None = None,
) -> int:
    """Serve until the end. Descriptor 2 is containerd's log by now; `path` is the listening socket's.

    `bundle` is the directory in which `start` was run: containerd's for the task that we are there for.
    `given` is what containerd wrote to `start`.
    `began` is what the monotonic clock said when this program was started.
    """
    timeline.begin(timeline.Timeline(began))
    logs.install(
        2, {"runtime": "io.containerd.kata.v2", "id": args.id, "namespace": args.namespace}, debug=args.debug
    )
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    for note in notes:
        log.warning("%s", note)
    try:
        trio.run(serve, args, path, bundle, listener, events, given)
    except BaseException:
        log.exception("the shim of %s ends by an error", args.id)
        return 1
    finally:
        address.remove(path)
    return 0


async def serve(args: Args, path: str, bundle: str, listener: int, events: str, given: bytes) -> None:
    """Serve on an inherited listening socket, whose path is `path`."""
    sock = trio.socket.from_stdlib_socket(socket.socket(fileno=listener))
    await run(
        trio.SocketListener(sock),
        namespace=args.namespace,
        publisher=Publisher(events, args.namespace),
        given=given,
        is_wanted=lambda: Path(bundle).is_dir(),
        leaving=lambda: address.remove(path),
    )


async def run(
    listener: trio.SocketListener,
    *,
    namespace: str,
    publisher: Publisher,
    leaving: Callable[[], None],
    given: bytes = b"",
    is_wanted: Callable[[], bool] = lambda: True,
    open_sandbox: OpenSandbox = open_sandbox,
    load_config: Callable[[str | None], Config] = load,
) -> None:
    """Serve on `listener`; `leaving` is called as soon as nobody shall find us any more.

    `given` is what containerd wrote to `start`, among it the options of a sandbox without a container.
    `is_wanted` says whether containerd still has a place for the task that we were started for.
    """
    stop = trio.Event()
    async with trio.open_nursery() as outer:
        outer.start_soon(publisher.run)
        async with trio.open_nursery() as nursery:
            pod = Pod(
                nursery,
                Announcer(publisher),
                namespace=namespace,
                open_sandbox=open_sandbox,
                load_config=load_config,
            )
            logs.follow(lambda: [f"{task.bundle}/{LOG_FIFO}" for task in pod.tasks])
            server = _server(pod, given, stop)
            connections = Connections(server, lambda: pod.in_use, is_wanted=is_wanted)
            pod.on_unused = connections.note_unused
            await nursery.start(trio.serve_listeners, connections.serve, [listener])
            nursery.start_soon(connections.watch_idle, stop)
            # To the very end: `delete` asks us to end while the last events may still be on their way, and a
            # signal that nobody receives would end us there.
            await outer.start(_watch_signals, stop, pod)
            timeline.mark("serving")
            await stop.wait()
            leaving()
            await pod.end(END_LIMIT)
            nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):  # bounded by drain
            await publisher.drain(EVENTS_LIMIT)
        outer.cancel_scope.cancel()


def _server(pod: Pod, given: bytes, stop: trio.Event) -> Server:
    """Return the RPC server with all services of a shim."""
    unified = host_is_unified()
    tasks = TaskService(pod, unified_cgroups=unified, stop=stop.set)
    sandboxes = SandboxService(pod, given=given, unified_cgroups=unified, stop=stop.set)
    server = Server(status_of=errors.status_of)
    for module in (task_v2_pb2, task_v3_pb2):
        server.add_service(module.DESCRIPTOR.services_by_name["Task"], tasks)
    server.add_service(sandbox_pb2.DESCRIPTOR.services_by_name["Sandbox"], sandboxes)
    return server


class Connections:
    """containerd's connections, one for each task id; closing one says nothing about the others."""

    def __init__(self, server: Server, busy: Callable[[], bool], *, is_wanted: Callable[[], bool]) -> None:
        self._server = server
        self._busy = busy
        self._is_wanted = is_wanted
        self._count = 0
        self._known = False  # there has been a connection
        self._served = False  # there has been a task, or a try to make one
        self._idle = trio.CancelScope(deadline=math.inf)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection to its end."""
        self._known = True
        self._count += 1
        self._note_idle()
        try:
            if is_same_user(peer_credentials(stream)):
                await self._server.serve_stream(stream)
            else:
                log.warning("a connection of another user was refused")
                await trio.aclose_forcefully(stream)
        except Exception:  # one connection's: the others must not pay for it
            log.exception("a connection ended by an error")
        finally:
            self._count -= 1
            self._note_idle()

    def note_unused(self) -> None:
        """There is nothing left that this process was there for."""
        self._served = True
        self._note_idle()

    def _note_idle(self) -> None:
        self._idle.deadline = math.inf if self._is_needed() else trio.current_time() + self._limit()

    def _is_needed(self) -> bool:
        return self._busy() or (self._count > 0 and not self._served)

    def _limit(self) -> float:
        return SERVED_LIMIT if self._served else IDLE_LIMIT

    async def watch_idle(self, stop: trio.Event) -> None:
        """Stop the process when nobody will ever want anything of it.

        A client that goes away while `start` runs makes containerd kill `start`, so that it never learns our
        address, and remove the bundle. Nothing tells a process to which nobody is connected: it looks for the
        bundle until somebody is. Where even that stays (containerd itself was killed), having had neither
        task nor connection for IDLE_LIMIT must do.

        After the last task, or a Create that failed, containerd sends Shutdown. One that was killed in the
        middle of the call does not, and when it comes back it may take whoever answers for a task that lives
        (1.6 does, for ever): then it is the end of our connection from which it learns that there is none.
        """
        self._note_idle()
        while True:
            with self._idle:
                wanted = True
                while wanted and not self._known:
                    # Before looking: who waited for us to serve comes first.
                    await trio.sleep(BUNDLE_INTERVAL)
                    wanted = self._is_wanted()
                if self._known:
                    await trio.sleep_forever()
                log.warning("containerd removed the bundle before it connected: the shim ends")
                break
            if not self._is_needed():
                log.warning("nobody wanted anything for %d s: the shim ends", self._limit())
                break
            self._idle = trio.CancelScope(deadline=math.inf)
        stop.set()


def is_same_user(peer: PeerCredentials) -> bool:
    """Say whether a peer may connect: containerd runs as the user that we run as."""
    return (peer.uid, peer.gid) == (os.geteuid(), os.getegid())


async def _watch_signals(stop: trio.Event, pod: Pod, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR2) as received:
        task_status.started()
        async for number in received:
            if number == signal.SIGUSR2:
                await report.write(pod)
                continue
            log.warning("%s: the pod and its shim end", signal.Signals(number).name)
            stop.set()
