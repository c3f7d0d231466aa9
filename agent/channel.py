"""Where the host finds the agent: a virtio port, vsock or a unix socket, and which handler a connection is
for.

A vsock connection has a port. On the other two, a connection (a yamux stream, on the virtio port) begins
with the line "CONNECT <port>", as with a hybrid vsock; the answer is "OK <port>", or "ERR <reason>" and the
end.

Port 1024 is the RPC server. A process whose streams the host wants to connect registers a port for each
before the host is told; a registered port takes one connection and is gone.
"""

from __future__ import annotations

import _socket
import os
import select
import threading
from typing import TYPE_CHECKING

from agent import log, threads
from agent.errors import AlreadyExists, InvalidArgument
from agent.streams import SHUT_RDWR, SocketStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.streams import ByteStream

    Handler = Callable[[ByteStream], None]

RPC_PORT = 1024  # Kata: vsock://-1:1024
PORT_NAME = "agent.channel.0"  # of the virtio port: Kata 1.x
VMADDR_CID_ANY = 0xFFFFFFFF  # linux/vm_sockets.h
BACKLOG = 128
MAX_LINE = 32  # bytes of a CONNECT line


class Dispatcher:
    """Knows who serves which port. The RPC port is served for ever, the others once."""

    def __init__(self) -> None:
        self.serve_rpc: Handler = _nobody  # set before the first connection
        self._lock = threading.Lock()
        self._waiting: dict[int, Handler] = {}
        self._listeners: dict[int, _socket.socket] = {}
        self.vsock = False

    def expect(self, port: int, handler: Handler) -> None:
        """Give the next connection to `port` to `handler`, in a thread of its own."""
        if port <= RPC_PORT:
            raise InvalidArgument(f"port {port} cannot be a stream's: 1 to {RPC_PORT} are the agent's")
        with self._lock:
            if port in self._waiting:
                raise AlreadyExists(f"port {port} already waits for a connection")
            self._waiting[port] = handler
            if self.vsock:
                listener = self._listeners[port] = listen_vsock(port)
                threads.start(f"vsock-{port}", self._accept_one, listener, port)

    def forget(self, port: int) -> None:
        """Wait no more."""
        with self._lock:
            self._waiting.pop(port, None)
            listener = self._listeners.pop(port, None)
        if listener is not None:
            _wake(listener)

    def take(self, port: int) -> Handler | None:
        """Return who serves a connection that has come for this port."""
        if port == RPC_PORT:
            return self.serve_rpc
        with self._lock:
            self._listeners.pop(port, None)
            return self._waiting.pop(port, None)

    def serve(self, stream: ByteStream) -> None:
        """Serve a connection that begins with a CONNECT line."""
        handler = None
        try:
            port = _read_port(stream)
            handler = self.take(port)
            if handler is None:
                stream.send(f"ERR nobody waits on port {port}\n".encode())
            else:
                stream.send(f"OK {port}\n".encode())
        except ValueError as exc:
            stream.send(f"ERR {exc}\n".encode())
        except OSError:
            pass
        if handler is None:
            stream.close()
        else:
            handler(stream)

    def _accept_one(self, listener: _socket.socket, port: int) -> None:
        try:
            fd, _ = listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return  # forgotten
        finally:
            listener.close()
        stream = SocketStream(_socket.socket(fileno=fd))
        handler = self.take(port)
        if handler is None:
            stream.close()
        else:
            handler(stream)


def _nobody(stream: ByteStream) -> None:
    stream.close()


def _read_port(stream: ByteStream) -> int:
    """Read the line byte by byte, since what follows is not ours.

    Raises:
        ValueError: it is no CONNECT line.
    """
    line = b""
    while not line.endswith(b"\n"):
        byte = stream.receive(1)
        line += byte
        if not byte or len(line) > MAX_LINE:
            raise ValueError("the connection must begin with CONNECT <port>")
    word, _, number = line.strip().partition(b" ")
    if word != b"CONNECT" or not number.isdigit():
        raise ValueError("the connection must begin with CONNECT <port>")
    return int(number)


def listen_unix(path: str) -> _socket.socket:
    """Listen on a unix socket. A dead one that is there is replaced."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(BACKLOG)
    return listener


def listen_vsock(port: int) -> _socket.socket:
    """Listen on a vsock port, for connections from the host only by what the host lets through."""
    listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
    listener.bind((VMADDR_CID_ANY, port))
    listener.listen(BACKLOG)
    return listener


def accept_all(listener: _socket.socket, handler: Handler) -> None:
    """Serve every connection in a thread of its own, for ever."""
    while True:
        try:
            fd, _ = listener._accept()  # type: ignore[attr-defined]
        except OSError as exc:
            log.error("cannot accept a connection", error=exc)
            # Out of descriptors: one may be free soon, and trying at once would only burn time.
            select.select([], [], [], 0.1)
            continue
        stream = SocketStream(_socket.socket(fileno=fd))
        threads.start("connection", handler, stream)


def find_port() -> str | None:
    """Return the path of the virtio port that is meant for the agent, if the machine has one."""
    base = "/sys/class/virtio-ports"
    try:
        names = os.listdir(base)
    except FileNotFoundError:
        return None
    for name in names:
        try:
            with open(f"{base}/{name}/name", encoding="utf-8") as file:
                if file.read().strip() == PORT_NAME:
                    return f"/dev/{name}"
        except OSError:
            continue
    return None


def serve_port(path: str, dispatcher: Dispatcher) -> None:
    """Serve the virtio port for ever: wait for a host, run its sessions, wait for the next one.

    The port stays open in between. Closing it would throw away what the next host may have sent already;
    what an older one has left is thrown away by the handshake.
    """
    from agent import multiplex

    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)

    def wait() -> None:
        wait_for_host(fd)

    while True:
        wait()
        try:
            multiplex.serve_line(fd, dispatcher.serve, wait)
        except OSError as exc:
            log.info("session over", port=path, error=exc)


def wait_for_host(fd: int) -> None:
    """Wait until a host has connected, which makes the port writable.

    Until then the port polls as hung up and, since reading it would not block, as readable. Only an
    edge-triggered wait sleeps through that.
    """
    epoll = select.epoll()
    try:
        epoll.register(fd, select.EPOLLOUT | select.EPOLLET)
        while not any(events & select.EPOLLOUT for _, events in epoll.poll()):
            pass
    finally:
        epoll.close()


def _wake(listener: _socket.socket) -> None:
    try:
        listener.shutdown(SHUT_RDWR)
    except OSError:
        pass
