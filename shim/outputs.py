"""Where a process's output goes on the host: a fifo, a file, a logging program, or nowhere.

All of them are descriptors of ours that never block the event loop. An output that breaks says so by an
OSError; whoever copies goes on reading and throws away, because a process must not hang for its reader.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import trio

from shim.stdio_uri import Kind, Target
from vc.errors import InvalidArgument

PIPE_BYTES = 1 << 20  # what any user may ask for: /proc/sys/fs/pipe-max-size
FIRST_POLL, LAST_POLL = 0.005, 0.1  # seconds
FILE_GRACE = 2.0  # seconds; longer, and the disk hangs: whoever closes must not


class Output(Protocol):
    """Bytes go in, in order; `ready` comes before the first write."""

    async def ready(self) -> None:
        """Wait until there is somebody to write to."""

    async def write_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write everything. Raises OSError if nobody will ever read it."""

    def close(self) -> None:
        """Give the descriptors back; the reader sees the end. Safe to call twice."""


class NullOutput:
    """Throws everything away."""

    async def ready(self) -> None:
        """Return at once."""
        await trio.lowlevel.checkpoint()

    async def write_all(self, data: bytes | bytearray | memoryview) -> None:
        """Do nothing."""
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Do nothing."""


class PipeOutput:
    """The write end of a pipe."""

    def __init__(self, descriptor: int = -1) -> None:
        self._write = descriptor
        if descriptor >= 0:
            os.set_blocking(descriptor, False)
            _enlarge(descriptor)

    async def ready(self) -> None:
        """Return at once: both ends are there."""
        await trio.lowlevel.checkpoint()

    async def write_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write everything, waiting while the pipe is full."""
        await trio.lowlevel.checkpoint()
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                if self._write < 0:
                    raise OSError(errno.EBADF, "closed meanwhile")
                try:
                    sent += os.write(self._write, view[sent:])
                except BlockingIOError:
                    try:
                        await trio.lowlevel.wait_writable(self._write)
                    except trio.ClosedResourceError:
                        raise OSError(errno.EBADF, "closed meanwhile") from None

    def close(self) -> None:
        """Close the write end."""
        if self._write >= 0:
            trio.lowlevel.notify_closing(self._write)
            os.close(self._write)
            self._write = -1


class FifoOutput(PipeOutput):
    """A named pipe of the client's, which may open its end after we have been asked to write.

    Writing waits for the first reader, so that a short-lived process does not lose its output. From then on a
    read end of our own keeps the fifo alive: when the client goes away (containerd restarts) there is no
    EPIPE, the bytes wait in the pipe, then the process blocks, and the next reader goes on without a loss.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._read = -1
        self._closed = False
        self._open()

    def _open(self) -> bool:
        """Open both ends if the client is there. Raises OSError if the path is no good."""
        try:
            self._write = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return False
            raise
        try:
            self._read = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            super().close()
            raise
        _enlarge(self._write)
        return True

    async def ready(self) -> None:
        """Wait for the reader, until it comes or we are cancelled.

        The kernel can only be polled for this (fifo(7): ENXIO), or blocked in by a thread that nothing
        can cancel.
        """
        delay = FIRST_POLL
        while self._write < 0 and not self._closed and not self._open():
            await trio.sleep(delay)
            delay = min(2 * delay, LAST_POLL)

    def close(self) -> None:
        """Close both ends."""
        self._closed = True
        super().close()
        if self._read >= 0:
            os.close(self._read)
            self._read = -1


class _File:
    """An open file that is closed when its last user has left: maybe a thread that still writes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._users = 1
        self._lock = threading.Lock()

    def join(self) -> int:
        """Return the descriptor, which is good until `leave`. Raises OSError if it is closed."""
        with self._lock:
            if not self._users:
                raise OSError(errno.EBADF, "closed meanwhile")
            self._users += 1
        return self._descriptor

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                os.close(self._descriptor)


class FileOutput:
    """A file that is appended to. Its writes go to a thread, for a disk may be slow, or hang."""

    def __init__(self, path: str, *, create: bool) -> None:
        if create:
            Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | (os.O_CREAT if create else 0)
        self._file = _File(os.open(path, flags, 0o644))
        self._closed = False

    async def ready(self) -> None:
        """Return at once."""
        await trio.lowlevel.checkpoint()

    async def write_all(self, data: bytes | bytearray | memoryview) -> None:
        """Append everything. Cancelled, it gives a write that is under way FILE_GRACE to finish."""
        token, written = trio.lowlevel.current_trio_token(), trio.Event()

        def write() -> None:
            descriptor = self._file.join()
            try:
                with memoryview(data) as view:
                    sent = 0
                    while sent < len(view):
                        sent += os.write(descriptor, view[sent:])
            finally:
                self._file.leave()
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(written.set)

        await trio.lowlevel.checkpoint()
        try:
            await trio.to_thread.run_sync(write, abandon_on_cancel=True)
        except trio.Cancelled:
            with trio.move_on_after(FILE_GRACE, shield=True):
                await written.wait()
            raise

    def close(self) -> None:
        """Close the file, once nothing is written to it any more."""
        if not self._closed:
            self._closed = True
            self._file.leave()


class Shared:
    """One output of several users: it is closed when the last of them has closed it.

    They write in turns, for no two tasks can wait for one descriptor.
    """

    def __init__(self, output: Output, users: int) -> None:
        self._output = output
        self._users = users
        self._turn = trio.Lock()

    def handle(self) -> Output:
        """Return one user's view."""
        return _Handle(self._output, self._turn, self._release)

    def _release(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._output.close()


class _Handle:
    def __init__(self, output: Output, turn: trio.Lock, release: Callable[[], None]) -> None:
        self._output = output
        self._turn = turn
        self._release: Callable[[], None] | None = release

    async def ready(self) -> None:
        await self._output.ready()

    async def write_all(self, data: bytes | bytearray | memoryview) -> None:
        async with self._turn:
            await self._output.write_all(data)

    def close(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None


def open_output(name: str, target: Target) -> Output:
    """Open one output that is not a logging program.

    Raises:
        InvalidArgument: it cannot be; the text names the path.
    """
    try:
        if target.kind is Kind.NONE:
            return NullOutput()
        if target.kind is Kind.FILE:
            return FileOutput(target.path, create=True)
        is_fifo = stat.S_ISFIFO(os.stat(target.path).st_mode)
        if is_fifo:
            return FifoOutput(target.path)
        if target.kind is Kind.FIFO:
            raise InvalidArgument(f"{name} {target.path!r} is no fifo")
        return FileOutput(target.path, create=False)
    except OSError as exc:
        raise InvalidArgument(f"{name} {target.path!r} cannot be opened: {exc.strerror}") from exc


def _enlarge(descriptor: int) -> None:
    """Make a pipe as large as any user may: fewer wake-ups of both sides."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        pass  # a limit of the user's pipes, or no pipe: slower, no more
