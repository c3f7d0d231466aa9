"""One process in a container: its exit, its signals, its streams."""

from __future__ import annotations

import _socket
import os
import struct
import threading
from typing import TYPE_CHECKING

from agent import stdio
from agent.errors import RuntimeFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.channel import Dispatcher, Handler
    from agent.reaper import Child
    from agent.stdio import Stdio
    from agent.streams import ByteStream

SOL_SOCKET, SCM_RIGHTS = 1, 1  # asm-generic/socket.h, linux/socket.h


class Ports:
    """The ports on which the host wants the streams of a process; 0 means that it uses calls.

    Registered before the process exists, because the host may know them as soon as it has the answer.
    Connections that come first wait for `connect`.
    """

    def __init__(self, dispatcher: Dispatcher, stdin: int, stdout: int, stderr: int) -> None:
        self._dispatcher = dispatcher
        self._numbers = (stdin, stdout, stderr)
        self._stdio: Stdio | None = None
        self._ready = threading.Event()
        registered: list[int] = []
        try:
            for index, port in enumerate(self._numbers):
                if port:
                    dispatcher.expect(port, self._handler(index))
                    registered.append(port)
        except BaseException:
            for port in registered:
                dispatcher.forget(port)
            raise

    def __getitem__(self, index: int) -> int:
        return self._numbers[index]

    def connect(self, streams: Stdio) -> None:
        """Let connections through to the streams."""
        self._stdio = streams
        self._ready.set()

    def close(self) -> None:
        """Expect no connections any more; those that wait are dropped."""
        for port in self._numbers:
            if port:
                self._dispatcher.forget(port)
        self._ready.set()

    def _handler(self, index: int) -> Handler:
        def serve(stream: ByteStream) -> None:
            self._ready.wait()
            relay = self._relay(index)
            if relay is None:
                stream.close()
            else:
                relay(stream)

        return serve

    def _relay(self, index: int) -> Callable[[ByteStream], None] | None:
        streams = self._stdio
        if streams is None:
            return None
        part = (streams.stdin, streams.stdout, streams.stderr)[index]
        return part.relay if part is not None else None


class Process:
    """A process that has been started (or, for an init process, created)."""

    def __init__(self, child: Child, streams: Stdio, ports: Ports, *, terminal: bool) -> None:
        self.pid = child.pid
        self.stdio = streams
        self.terminal = terminal
        self.waited = False  # somebody has been told how it ended
        self._child = child
        self._ports = ports
        child.on_end(lambda _status: streams.settle())
        ports.connect(streams)

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._child.status is not None

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end; returns the exit status, or None after `timeout` seconds."""
        return self._child.wait(timeout)

    def written(self, output: int) -> int | None:
        """Return how many bytes the process wrote to stream 1 or 2, if that stream has a port."""
        part = self.stdio.stdout if output == 1 else self.stdio.stderr
        return part.bytes_at_exit if part is not None and self._ports[output] else None

    def on_end(self, callback: Callable[[int], None]) -> None:
        """Call this when the process ends; it must not block."""
        self._child.on_end(callback)

    def kill(self, signal: int) -> None:
        """Send a signal. A process that has ended takes it, as a zombie would."""
        try:
            self._child.kill(signal)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        """Drop the streams and whoever waits for them."""
        self._ports.close()
        self.stdio.close()


class Console:
    """The socket over which crun hands out the master side of a new terminal."""

    def __init__(self, directory: str) -> None:
        self.path = f"{directory}/console.sock"
        self._listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._listener.settimeout(0)

    def receive(self) -> int:
        """Return the master's descriptor. crun has sent it by the time it ends."""
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            raise RuntimeFailed("crun did not make the terminal that was asked for") from None
        connection = _socket.socket(fileno=fd)
        _, ancillary, _, _ = connection.recvmsg(4096, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
        connection.close()
        for level, kind, data in ancillary:
            if (level, kind) == (SOL_SOCKET, SCM_RIGHTS) and len(data) >= 4:
                master: int = struct.unpack("i", data[:4])[0]
                return master
        raise RuntimeFailed("crun sent no terminal")

    def close(self) -> None:
        """Remove the socket."""
        self._listener.close()
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass


def launch(
    make: Callable[[tuple[int, ...], str | None], Child],
    ports: Ports,
    *,
    directory: str,
    terminal: bool,
    uid: int,
    pipe_size: int,
) -> Process:
    """Make a process with pipes or a terminal. `make` is given its streams, or the console socket."""
    try:
        if not terminal:
            pipes = stdio.Pipes(pipe_size, uid)
            try:
                child = make(tuple(pipes.child), None)
                return Process(child, pipes.started(), ports, terminal=False)
            finally:
                pipes.close()
        console = Console(directory)
        try:
            child = make((), console.path)
            return Process(child, stdio.terminal(console.receive()), ports, terminal=True)
        finally:
            console.close()
    except BaseException:
        ports.close()
        raise
