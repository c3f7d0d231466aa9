"""The standard streams of one process: pipes or a terminal, and the two ways to them from the host.

The host reads and writes piece by piece with calls (ReadStdout), or takes a stream of its own for each
direction (`relay`). Rules:

- Nothing is read ahead: a host that does not read stops the process when its pipe is full, as any pipe does.
- When the process ends, `settle` fixes how many bytes belong to it: everything in the pipe at that moment.
  Those are delivered however slowly the host reads. What a background child writes later still flows to a
  stream; calls see the end of the file at the latest DRAIN_SECONDS after the exit, for the host waits for
  it before it reports the exit.
- Whoever stops listening does not kill the process: the rest of its output is thrown away.
- Pipes, never sockets, so that a process can open /dev/stdout again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import threading
import time
from typing import TYPE_CHECKING

from agent import log
from agent.errors import NoTerminal, WrongState

if TYPE_CHECKING:
    from agent.streams import ByteStream

TIOCSWINSZ = 0x5414  # asm-generic/ioctls.h; the module `termios` is not in a minimal Python
FIONREAD = 0x541B  # asm-generic/ioctls.h
F_SETPIPE_SZ = 1031  # linux/fcntl.h

DRAIN_SECONDS = 0.5  # as in Kata's agent
RELAY_SIZE = 256 << 10  # bytes read at once: the smallest window of a yamux stream
DEFAULT_PIPE_SIZE = 256 << 10  # bytes; the kernel's 64 KiB make the process and the relay take turns
MAX_PENDING = 1 << 20  # output kept of a terminal that has ended; the kernel holds some 70 KB


class End:
    """The descriptors that wake whoever waits for a stream of the process: its end, and the end of its
    record.
    """

    def __init__(self) -> None:
        self.ended = os.eventfd(0, os.EFD_CLOEXEC)
        self.closing = os.eventfd(0, os.EFD_CLOEXEC)
        self.ended_at: float | None = None

    def mark_ended(self) -> None:
        """Say that the process has ended."""
        self.ended_at = time.monotonic()
        os.eventfd_write(self.ended, 1)

    def __del__(self) -> None:
        os.close(self.ended)
        os.close(self.closing)


class _Descriptor:
    """A descriptor that several threads wait for, closed by the last one that leaves."""

    def __init__(self, fd: int, end: End) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._end = end
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._stream: ByteStream | None = None

    def _wait(self, events: int, timeout: float | None = None, *, until_ended: bool = True) -> bool:
        """Wait for `events` of the descriptor, or an end; False if the timeout came first or it is being
        closed.
        """
        with self._lock:
            if self._closed:
                return False
            self._users += 1
        try:
            poll = select.poll()
            poll.register(self._fd, events)
            poll.register(self._end.closing, select.POLLIN)
            if until_ended:
                poll.register(self._end.ended, select.POLLIN)
            ready = poll.poll(None if timeout is None else max(0, timeout * 1000))
            return bool(ready) and all(fd != self._end.closing for fd, _ in ready)
        finally:
            with self._lock:
                self._users -= 1
                self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closed and not self._users and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """Close the descriptor as soon as nobody waits for it."""
        with self._lock:
            self._closed = True
            self._close_if_unused()

    def abort(self) -> None:
        """Close, and drop the connection that is relayed to."""
        self.close()
        if self._stream is not None:
            self._stream.close()


class Output(_Descriptor):
    """What the process writes. Read by calls, or by one relay, never both."""

    def __init__(self, fd: int, end: End, *, terminal: bool) -> None:
        super().__init__(fd, end)
        self._terminal = terminal
        self._pending = b""
        self._taken = 0
        self._at_end = False
        self.bytes_at_exit: int | None = None

    def settle(self) -> None:
        """Fix how many bytes the process, which has just ended, has written. Does not block."""
        with self._lock:
            if self._fd < 0 or self._closed:
                self.bytes_at_exit = self._taken
            elif self._terminal:
                # A terminal tells only the size of its first buffer, so its rest is taken out of it.
                while len(self._pending) < MAX_PENDING and (piece := self._read(65536)):
                    self._pending += piece
                self.bytes_at_exit = self._taken + len(self._pending)
            else:
                (left,) = struct.unpack("i", fcntl.ioctl(self._fd, FIONREAD, b"\0" * 4))
                self.bytes_at_exit = self._taken + left

    def read(self, size: int) -> bytes:
        """Wait for at most `size` bytes; none means the end."""
        while True:
            if self._past_deadline():
                return self._end_of_file()
            data = self._take(size)
            if data is not None:
                return data or self._end_of_file()
            if self._end.ended_at is None:
                if not self._wait(select.POLLIN) and self._closed:
                    return b""
            else:
                left = self._end.ended_at + DRAIN_SECONDS - time.monotonic()
                if not self._wait(select.POLLIN, left, until_ended=False):
                    return self._end_of_file()

    def relay(self, stream: ByteStream) -> None:
        """Send everything to the host until the end of the file, and say so. Closes the stream and the
        descriptor.
        """
        self._stream = stream
        try:
            self._relay(stream)
        finally:
            self.close()
            stream.close()

    def _relay(self, stream: ByteStream) -> None:
        listening = True
        while True:
            # Looked at before taking: `settle` takes what a terminal still holds, and then the descriptor
            # has nothing to wake us by. Later on only the descriptor counts: a child may go on writing.
            ended = self._end.ended_at is not None
            data = self._take(RELAY_SIZE)
            if data is None:
                if not self._wait(select.POLLIN, until_ended=not ended):
                    return
            elif not data:
                break
            elif listening:
                try:
                    stream.send(data)
                except OSError as exc:
                    log.debug("output is discarded: the host does not listen", error=exc)
                    listening = False
        if listening:
            stream.close_sending()

    def _take(self, size: int) -> bytes | None:
        with self._lock:
            if self._pending:
                data, self._pending = self._pending[:size], self._pending[size:]
            elif self._at_end or self._closed:
                return b""
            else:
                taken = self._read(size)
                if taken is None:
                    return None
                data = taken
            self._taken += len(data)
            return data

    def _read(self, size: int) -> bytes | None:
        try:
            return os.read(self._fd, size)
        except BlockingIOError:
            return None
        except OSError as exc:
            if exc.errno != errno.EIO:  # what the last process leaves on a terminal: the end
                raise
            return b""

    def _past_deadline(self) -> bool:
        """Whether all that belongs to the process is out and the time for its children has passed."""
        ended_at, owed = self._end.ended_at, self.bytes_at_exit
        return (
            ended_at is not None
            and owed is not None
            and self._taken >= owed
            and time.monotonic() > ended_at + DRAIN_SECONDS
        )

    def _end_of_file(self) -> bytes:
        self._at_end = True
        self.close()
        return b""


class Input(_Descriptor):
    """What the process reads."""

    def __init__(self, fd: int, end: End, *, terminal: bool) -> None:
        super().__init__(fd, end)
        self._terminal = terminal
        self._write_lock = threading.Lock()

    def write(self, data: bytes) -> None:
        """Write everything, waiting while the process does not read.

        Raises:
            WrongState: nobody reads any more.
        """
        view = memoryview(data)
        with self._write_lock:
            while view:
                with self._lock:
                    if self._closed or self._end.ended_at is not None:
                        raise WrongState("cannot get stream writer: standard input is closed")
                    try:
                        view = view[os.write(self._fd, view) :]
                        continue
                    except BlockingIOError:
                        pass
                    except OSError as exc:
                        raise WrongState(f"cannot write to standard input: {exc.strerror}") from exc
                self._wait(select.POLLOUT)

    def end(self) -> None:
        """Give the process the end of its input. A terminal has none to give: its user types Ctrl-D."""
        if not self._terminal:
            self.close()

    def relay(self, stream: ByteStream) -> None:
        """Write what the host sends until it sends no more. Closes the stream, and the input if it is a
        pipe.
        """
        self._stream = stream
        try:
            while data := stream.receive(RELAY_SIZE):
                self.write(data)
        except (OSError, WrongState) as exc:
            log.debug("input ended early", error=exc)
        finally:
            self.end()
            stream.close()

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size.

        Raises:
            NoTerminal: it is a pipe.
        """
        with self._lock:
            if not self._terminal:
                raise NoTerminal("no tty")
            if not self._closed:
                fcntl.ioctl(self._fd, TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Stdio:
    """All streams of one process, on our side; `stdout` carries a terminal's output, and then there is no
    `stderr`.
    """

    def __init__(self, stdin: Input, stdout: Output, stderr: Output | None, end: End) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self._end = end

    def settle(self) -> None:
        """Note the end of the process. Does not block."""
        # In this order: a reader that sees the end relies on the count.
        for output in (self.stdout, self.stderr):
            if output is not None:
                output.settle()
        self._end.mark_ended()

    def close(self) -> None:
        """Stop everything that waits, at once."""
        os.eventfd_write(self._end.closing, 1)
        for part in (self.stdin, self.stdout, self.stderr):
            if part is not None:
                part.abort()


class Pipes:
    """The pipes of a process that is about to start: both ends."""

    def __init__(self, size: int, uid: int) -> None:
        self.child: list[int] = []  # what becomes descriptors 0, 1, 2
        self._ours: list[int] = []
        try:
            for index in range(3):
                reader, writer = os.pipe2(os.O_CLOEXEC)
                child, ours = (reader, writer) if index == 0 else (writer, reader)
                self.child.append(child)
                self._ours.append(ours)
                if index:
                    _set_size(ours, size)
                if uid:
                    os.fchown(child, uid, -1)  # so that the process can open /dev/stdout again
        except BaseException:
            self.close()
            raise

    def started(self) -> Stdio:
        """Keep our ends, as the streams of a process that has the others by now."""
        end = End()
        stdin, stdout, stderr = self._ours
        self._ours = []
        self.close()
        return Stdio(
            Input(stdin, end, terminal=False),
            Output(stdout, end, terminal=False),
            Output(stderr, end, terminal=False),
            end,
        )

    def close(self) -> None:
        """Close what is still here."""
        for fd in (*self.child, *self._ours):
            os.close(fd)
        self.child, self._ours = [], []


def terminal(master: int) -> Stdio:
    """Take over the master side of a terminal."""
    end = End()
    return Stdio(Input(os.dup(master), end, terminal=True), Output(master, end, terminal=True), None, end)


def _set_size(fd: int, size: int) -> None:
    try:
        fcntl.fcntl(fd, F_SETPIPE_SZ, size)
    except OSError as exc:  # above the limit of the system: the pipe stays as it is
        log.debug("pipe keeps its size", wanted=size, error=exc)
