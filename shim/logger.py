"""A logging program: a child that reads a process's output from descriptors 3 and 4.

It gets nothing else from us: standard streams on /dev/null, two variables as its environment, and on
descriptor 5 a pipe on which it says, by a byte or by closing it, that it is ready to read.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import struct
import termios
from contextlib import ExitStack

import trio

from shim.outputs import PipeOutput
from shim.stdio_uri import Target
from vc.errors import InvalidArgument

log = logging.getLogger(__name__)

STDOUT_FD, STDERR_FD, READY_FD = 3, 4, 5  # containerd, runtime v2 logging package
ABOVE = 10  # our copies are above the numbers that the child's are put on
# A full pipe may still be unread when the process is deleted, and a simple program dies of SIGTERM at once:
# one that goes on reading is not sent it. Less than `delete` gives the serving process, so that the signal is
# sent while that lives; who reads slowly lives on after that, and finds the end of its pipes.
END_GRACE = 1.5  # seconds without anything being read
READ_LIMIT = 60.0  # seconds for a program to read what is left
TERM_GRACE = 12.0  # seconds, as in the reference shim
KILL_WAIT = 2.0  # seconds


class LoggerPipe(PipeOutput):
    """One output of a logging program. After `close` it can tell how much of it has not been read."""

    _read = -1

    def close(self) -> None:
        """Close the write end. Until `release` a read end of ours stays, unnoticed by the program."""
        if self._write >= 0:
            try:
                # Not earlier: with it, a program that ends would not break the pipe.
                self._read = os.open(f"/proc/self/fd/{self._write}", os.O_RDONLY | os.O_NONBLOCK)
            except OSError as exc:
                log.debug("what a logging program has not read will not be known: %s", exc)
        super().close()

    def unread(self) -> int:
        """Return how many bytes are in it, 0 if that is not known."""
        if self._read < 0:
            return 0
        count: int = struct.unpack("i", fcntl.ioctl(self._read, termios.FIONREAD, bytes(4)))[0]
        return count

    def release(self) -> None:
        """Close the read end."""
        if self._read >= 0:
            os.close(self._read)
            self._read = -1


class Logger:
    """A running logging program. `stdout` and `stderr` are what to write to."""

    def __init__(self, target: Target, pid: int, stdout: LoggerPipe, stderr: LoggerPipe) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self._path = target.path
        self._pid = pid
        self._handle = os.pidfd_open(pid)

    async def end(self) -> None:
        """Close its input and let it finish; kill it if it does not. Always reaps it."""
        self.stdout.close()
        self.stderr.close()
        if self._handle < 0:
            return
        with trio.CancelScope(shield=True):  # each wait below is bounded
            ended = await self._wait_read()
            steps = () if ended else ((signal.SIGTERM, TERM_GRACE), (signal.SIGKILL, KILL_WAIT))
            for number, limit in steps:
                signal.pidfd_send_signal(self._handle, number)
                if ended := await self._wait_ended(limit):
                    break
            if not ended:
                log.error("logging program %s (pid %d) cannot be killed", self._path, self._pid)
        self.stdout.release()
        self.stderr.release()
        trio.lowlevel.notify_closing(self._handle)
        os.close(self._handle)
        self._handle = -1

    async def _wait_read(self) -> bool:
        """Wait as long as the program goes on reading; whether it ended."""
        with trio.move_on_after(READ_LIMIT):
            unread = self._unread()
            while not await self._wait_ended(END_GRACE):
                before, unread = unread, self._unread()
                if unread == before:
                    return False
            return True
        return False

    def _unread(self) -> int:
        return self.stdout.unread() + self.stderr.unread()

    async def _wait_ended(self, limit: float) -> bool:
        with trio.move_on_after(limit):
            await trio.lowlevel.wait_readable(self._handle)
            os.waitid(os.P_PIDFD, self._handle, os.WEXITED)
            return True
        return False


async def open_logger(target: Target, *, container_id: str, namespace: str) -> Logger:
    """Start a logging program and wait until it is ready.

    Raises:
        InvalidArgument: it cannot be run, or a strict one ended without saying that it is ready.
    """
    environment = {"CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace}
    with ExitStack() as ours, ExitStack() as theirs:
        try:
            (out_read, out_write), (err_read, err_write), (ready_read, ready_write) = (
                _pipe(theirs, ours),
                _pipe(theirs, ours),
                _pipe(ours, theirs),
            )
            pid = _spawn(target, environment, out_read, err_read, ready_write)
        except OSError as exc:
            raise InvalidArgument(f"logging program {target.path!r} cannot be run: {exc.strerror}") from exc
        theirs.close()
        logger = Logger(target, pid, LoggerPipe(out_write), LoggerPipe(err_write))
        ours.pop_all()
    try:
        word = await _read_word(ready_read)
        if target.strict and not word:
            raise InvalidArgument(f"logging program {target.path!r} ended without saying that it is ready")
    except BaseException:
        await logger.end()
        raise
    return logger


def _pipe(reader: ExitStack, writer: ExitStack) -> tuple[int, int]:
    """Make a pipe with descriptors that the child's numbers cannot hit; each end is closed with its stack."""
    with ExitStack() as low:
        ends = os.pipe()
        for end in ends:
            low.callback(os.close, end)
        moved = []
        for end, stack in zip(ends, (reader, writer), strict=True):
            moved.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, ABOVE))
            stack.callback(os.close, moved[-1])
    return moved[0], moved[1]


def _spawn(target: Target, environment: dict[str, str], stdout: int, stderr: int, ready: int) -> int:
    null = [(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in (0, 1, 2)]
    ours = ((stdout, STDOUT_FD), (stderr, STDERR_FD), (ready, READY_FD))
    return os.posix_spawn(
        target.path,
        [target.path, *target.arguments],
        environment,
        file_actions=[*null, *((os.POSIX_SPAWN_DUP2, source, number) for source, number in ours)],
        setsigdef=[signal.SIGPIPE],  # Python ignores it, and children inherit that
    )


async def _read_word(descriptor: int) -> bytes:
    """Wait for a byte or the end, as long as it takes: the reference sets no limit either."""
    os.set_blocking(descriptor, False)
    try:
        await trio.lowlevel.wait_readable(descriptor)
        return os.read(descriptor, 1)
    finally:
        trio.lowlevel.notify_closing(descriptor)
        os.close(descriptor)
