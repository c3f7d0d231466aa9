"""Ways to reach the agent in the guest, as streams, one per port.

A driver says where its guest can be reached (an `Address`), `open_transport` reaches it, and everything above
dials ports and sees trio streams, whatever carries them:

- vsock: a socket of the address family itself, one connection per port.
- hybrid vsock: a unix socket of the VMM. A connection begins with the line `CONNECT <port>`; the VMM answers
  `OK <number>` once the guest has accepted, or closes (Firecracker, docs/vsock.md, "Host-Initiated
  Connections").
- unix: an agent on this host, with the same lines.
- serial: a virtio-serial port, which is a line without connections. A yamux session makes streams of it; each
  stream begins with the same lines, and a refusal is `ERR <text>` and the end of the stream.

The rule of this file: the guest is hostile. Lines are bounded, each wait has a limit, and whatever a guest
sends makes at worst its own dial fail with a `VCError`.
"""

from __future__ import annotations

import errno
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from vc.background import background
from vc.errors import GuestGone, NotFound, Timeout
from vc.unixsock import connect_stream
from yamux.errors import RemoteProtocolError
from yamux.serial import open_over_serial
from yamux.session import Session

AGENT_PORT = 1024  # the agent's ttrpc server: Kata's vsock port
DIAL_TIMEOUT = 10.0  # seconds for one dial of a guest that is up
MAX_LINE_BYTES = 256  # of the answer to CONNECT: an OK and a number, or a reason of one line
POLL_INTERVAL = 0.02  # seconds between attempts, where nothing tells when the guest begins to listen
# Seconds until an unanswered opening of a serial line is repeated, doubled each time. A guest that boots
# answers the first one whenever it comes; a repeat helps only one that was stuck in an older session.
FIRST_REPEAT = 4.0
# What a guest may send on a stream before we have taken any of it. With yamux's own 256 KiB it would wait for
# our word after each half of that; it costs memory only while somebody does not read.
MAX_WINDOW = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class SerialAddress:
    """The VMM's socket of a virtio-serial port, as whose only client we come."""

    path: Path


@dataclass(frozen=True, slots=True)
class HybridVsockAddress:
    """The VMM's unix socket that leads to all vsock ports of the guest."""

    path: Path


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """The guest's context id."""

    cid: int


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The socket of an agent that runs on this host."""

    path: Path


Address = SerialAddress | HybridVsockAddress | VsockAddress | UnixAddress


class Transport(ABC):
    """A guest that has been reached once."""

    @abstractmethod
    async def dial(self, port: int) -> trio.abc.HalfCloseableStream:
        """Connect to a port of the guest; the caller closes the stream.

        Raises:
            NotFound: nobody listens on that port.
            Timeout: no answer within 10 s.
            GuestGone: the way to the guest is cut.
        """


def open_transport(address: Address, *, timeout: float) -> AbstractAsyncContextManager[Transport]:
    """Wait until the agent of a guest can be reached, `timeout` seconds at most.

    The transport works inside the block. Its end is no exception there: dials raise `GuestGone` and streams
    break.

    Raises:
        Timeout: the agent did not appear in time.
        GuestGone: the VMM went away before.
    """
    if isinstance(address, SerialAddress):
        return _open_serial(address.path, timeout)
    if isinstance(address, VsockAddress):
        return _open_sockets(_VsockTransport(address), timeout)
    return _open_sockets(_UnixTransport(address), timeout)


# The lines that begin a connection


class _Refused(Exception):
    """The other side answered that there is no such port, or went away instead of an answer."""


def format_connect(port: int) -> bytes:
    """Return the line that asks for a port."""
    return b"CONNECT %d\n" % port


def check_answer_untrusted(line: bytes) -> None:
    """Take the answer to CONNECT without its newline. Raises: _Refused, with the reason if there is one."""
    word, _, rest = line.partition(b" ")
    if word != b"OK":
        reason = rest if word == b"ERR" else line
        raise _Refused(ascii(reason.decode("ascii", "replace"))[1:-1] or "no reason given")


async def _greet(stream: trio.abc.HalfCloseableStream, port: int) -> None:
    """Ask for a port on a new connection, and read not one byte more than the answer."""
    await stream.send_all(format_connect(port))
    line = bytearray()
    while True:
        byte = await stream.receive_some(1)
        if not byte:
            raise _Refused("the connection was closed instead of an answer")
        if byte == b"\n":
            break
        line += byte
        if len(line) > MAX_LINE_BYTES:
            raise _Refused(f"an answer of more than {MAX_LINE_BYTES} bytes")
    check_answer_untrusted(bytes(line))


async def _greeted(
    connect: Callable[[], Awaitable[trio.abc.HalfCloseableStream]], port: int
) -> trio.abc.HalfCloseableStream:
    """Connect and ask for a port; the stream is closed if that fails."""
    stream = await connect()
    try:
        await _greet(stream, port)
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


# Sockets: one connection for each port


class _SocketTransport(Transport):
    """What has connections of its own. The first one, which shows that the agent is there, serves a dial."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._first: trio.abc.HalfCloseableStream | None = None

    @abstractmethod
    async def _connect(self, port: int) -> trio.abc.HalfCloseableStream:
        """Connect once. Raises: _Refused, OSError, trio.BrokenResourceError."""

    async def wait_ready(self) -> None:
        """Connect to the agent's port again and again until it is there.

        A connection to a guest that is not up yet is refused, and nothing tells when the next will not be.
        """
        while self._first is None:
            try:
                with trio.move_on_after(DIAL_TIMEOUT):
                    self._first = await self._connect(AGENT_PORT)
            except (_Refused, OSError, trio.BrokenResourceError):
                await trio.sleep(POLL_INTERVAL)

    async def dial(self, port: int) -> trio.abc.HalfCloseableStream:
        """See `Transport.dial`."""
        if port == AGENT_PORT and self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            with trio.fail_after(DIAL_TIMEOUT):
                return await self._connect(port)
        except trio.TooSlowError:
            raise Timeout(f"port {port} of {self.address}: no answer within {DIAL_TIMEOUT:g} s") from None
        except FileNotFoundError as exc:
            raise GuestGone(f"{self.address} is gone") from exc
        except (_Refused, OSError, trio.BrokenResourceError) as exc:
            raise NotFound(f"port {port} of {self.address}: refused: {exc}") from exc

    async def aclose(self) -> None:
        """Close what nobody dialed."""
        if self._first is not None:
            await trio.aclose_forcefully(self._first)


class _UnixTransport(_SocketTransport):
    """Hybrid vsock, or an agent of this host."""

    def __init__(self, address: HybridVsockAddress | UnixAddress) -> None:
        super().__init__(address)
        self._path = address.path

    async def _connect(self, port: int) -> trio.abc.HalfCloseableStream:
        async def connect() -> trio.SocketStream:
            return connect_stream(self._path)

        return await _greeted(connect, port)


class _VsockTransport(_SocketTransport):
    """vsock, where the connection itself says which port is meant."""

    def __init__(self, address: VsockAddress) -> None:
        super().__init__(address)
        self._cid = address.cid

    async def _connect(self, port: int) -> trio.abc.HalfCloseableStream:
        sock = trio.socket.socket(trio.socket.AF_VSOCK, trio.socket.SOCK_STREAM)
        try:
            await sock.connect((self._cid, port))
            return trio.SocketStream(sock)
        except BaseException:
            sock.close()
            raise


@asynccontextmanager
async def _open_sockets(transport: _SocketTransport, timeout: float) -> AsyncIterator[Transport]:
    try:
        with trio.fail_after(timeout):
            await transport.wait_ready()
    except trio.TooSlowError:
        raise Timeout(
            f"nobody answered on port {AGENT_PORT} of {transport.address} within {timeout:g} s"
        ) from None
    try:
        yield transport
    finally:
        await transport.aclose()


# The serial line


class _SerialTransport(Transport):
    """Streams of one yamux session."""

    def __init__(self, path: Path, session: Session) -> None:
        self._path = path
        self._session = session
        self._cause: Exception | None = None

    async def carry(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the session; its end is told to whoever dials."""
        try:
            await self._session.run(task_status=task_status)
        except (trio.BrokenResourceError, RemoteProtocolError) as exc:
            self._cause = exc

    async def dial(self, port: int) -> trio.abc.HalfCloseableStream:
        """See `Transport.dial`."""
        try:
            with trio.fail_after(DIAL_TIMEOUT):
                return await _greeted(self._session.open_stream, port)
        except trio.TooSlowError:
            raise Timeout(f"port {port} of {self._path}: no answer within {DIAL_TIMEOUT:g} s") from None
        except _Refused as exc:
            raise NotFound(f"port {port} of {self._path}: refused: {exc}") from exc
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise GuestGone(f"the serial line {self._path} ended: {self._cause or exc}") from exc


@asynccontextmanager
async def _open_serial(path: Path, timeout: float) -> AsyncIterator[Transport]:
    try:
        with trio.fail_after(timeout):
            session = await _open_session(path)
    except trio.TooSlowError:
        raise Timeout(f"the agent did not answer on the serial line {path} within {timeout:g} s") from None
    transport = _SerialTransport(path, session)
    async with background() as nursery:
        await nursery.start(transport.carry)
        yield transport


async def _open_session(path: Path) -> Session:
    """Open the line anew and begin a session on it; it does not run yet.

    While the guest has not opened its end, what we send waits in the socket, so the answer comes the moment
    it does. A guest that is stuck in an older session swallows the opening; closing the line tells it.
    """
    repeat = FIRST_REPEAT
    while True:
        try:
            stream = connect_stream(path)
        except OSError as exc:
            if exc.errno != errno.EAGAIN:  # the VMM has not taken notice of the connection that we closed
                raise GuestGone(f"the serial line {path} cannot be opened: {exc}") from exc
            await trio.sleep(POLL_INTERVAL)
            continue
        # A random value: the answers to openings of earlier sessions may still be in the line.
        nonce = secrets.randbits(32)
        try:
            # It is we who open streams. What came on one of the guest's, which nobody accepts, would be kept.
            return await open_over_serial(
                stream, nonce=nonce, timeout=repeat, max_window=MAX_WINDOW, backlog=0
            )
        except trio.BrokenResourceError as exc:
            raise GuestGone(f"the VMM closed the serial line {path}: {exc}") from exc
        except trio.TooSlowError:
            repeat *= 2
