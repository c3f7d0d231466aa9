"""A process's streams: guest on one side, the client's fifos on the other.

Each direction is a task that reads only when its last bytes are gone, so a slow reader slows the process and
nothing is buffered without bound. Nothing is lost: an output fifo waits for its reader, survives its leaving,
and ends when the guest's stream ends, before the exit is told to whoever waits. stdin ends by CloseIO alone,
after the bytes that are in the fifo by then; a client that goes away ends nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import stat

import trio

from shim.logger import Logger, open_logger
from shim.outputs import Output, Shared, open_output
from shim.stdio_uri import Kind, Plan, Target
from vc import timeline
from vc.errors import InvalidArgument, VCError
from vc.process import Process

log = logging.getLogger(__name__)

CHUNK = 256 << 10  # bytes taken from the guest at once
STDIN_CHUNK = 64 << 10  # bytes; a fifo holds no more by default
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
DRAIN_LIMIT = 10.0  # seconds from exit: then it is reported although the reader has not taken everything
IDLE_LIMIT = 0.5  # seconds of silence after exit that count as the end, where the guest tells no byte counts


class Copier:
    """One output on its way from the guest to `output`."""

    def __init__(self, name: str, output: Output) -> None:
        self.copied = 0  # bytes
        self.ended = False
        self.writing = False
        self._full = False
        self._name = name
        self._output = output
        self._progress = trio.Event()

    async def run(self, stream: trio.abc.ReceiveStream) -> None:
        """Copy until the stream ends, then close the output, which the client waits for."""
        try:
            await self._copy(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, VCError) as exc:
            log.debug("%s ended early: %s", self._name, exc)
        finally:
            self.close()
            await trio.aclose_forcefully(stream)

    async def _copy(self, stream: trio.abc.ReceiveStream) -> None:
        broken = False
        self.writing = True
        try:
            await self._output.ready()
        except OSError as exc:
            broken = self._give_up(exc)
        self.writing = False
        while data := await stream.receive_some(CHUNK):
            timeline.mark("first output")
            self.writing = True
            if not broken:
                broken = await self._write(data)
            self.writing = False
            self.copied += len(data)
            self._notify()

    async def _write(self, data: bytes | bytearray) -> bool:
        """Write; say whether this output is broken for good. A full disk is not: it may have room again."""
        try:
            await self._output.write_all(data)
        except OSError as exc:
            if exc.errno not in NO_ROOM:
                return self._give_up(exc)
            if not self._full:
                log.warning("%s is lost until there is room: %s", self._name, exc)
            self._full = True
        else:
            if self._full:
                log.warning("%s is written again: there is room", self._name)
            self._full = False
        return False

    def _give_up(self, exc: OSError) -> bool:
        """Let the process go on without a reader: it must neither hang nor be killed for one."""
        log.warning("%s is thrown away from here on: %s", self._name, exc)
        self._output.close()
        return True

    def close(self) -> None:
        """End the output."""
        self.ended = True
        self._output.close()
        self._notify()

    def _notify(self) -> None:
        self._progress.set()
        self._progress = trio.Event()

    async def wait_copied(self, count: int | None) -> None:
        """Wait until that many bytes or all have been copied.

        None: the guest does not know how many there were. A background process may keep the stream open,
        so silence counts as the end, unless it is the reader who is slow.
        """
        while not self.ended and (count is None or self.copied < count):
            with trio.move_on_after(IDLE_LIMIT if count is None else float("inf")) as scope:
                await self._progress.wait()
            if scope.cancelled_caught and not self.writing:
                return


class FifoInput:
    """The client's stdin. Our own write end keeps a client that detaches from ending it."""

    def __init__(self, path: str, *, closing: bool) -> None:
        """`closing`: CloseIO has come already, so the end is when the client's own writer is gone."""
        self._write = -1
        self._read = -1
        try:
            self._read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            if not closing and stat.S_ISFIFO(os.fstat(self._read).st_mode):
                # At once: without a writer a read says "end" instead of "wait".
                self._write = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as exc:
            self.close()
            raise InvalidArgument(f"stdin {path!r} cannot be opened: {exc.strerror}") from exc

    def close_writer(self) -> None:
        """Let the end come: after the bytes in the fifo, once the client's writers are gone."""
        if self._write >= 0:
            os.close(self._write)
            self._write = -1

    async def receive_some(self) -> bytes:
        """Return the next bytes, empty at the end."""
        await trio.lowlevel.checkpoint()
        while self._read >= 0:
            try:
                return os.read(self._read, STDIN_CHUNK)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._read)
        raise trio.ClosedResourceError("stdin was closed")

    def close(self) -> None:
        """Close both ends: a client that still writes gets EPIPE. Safe to call twice."""
        self.close_writer()
        if self._read >= 0:
            trio.lowlevel.notify_closing(self._read)
            os.close(self._read)
            self._read = -1


class ProcessIO:
    """All streams of one process. `open`, then `run` beside the process, then `close`."""

    def __init__(self, plan: Plan, *, process_id: str, namespace: str) -> None:
        """`process_id` is the exec id, or the container's: what a logging program is told."""
        self.plan = plan
        self._process_id = process_id
        self._namespace = namespace
        self._stdin: FifoInput | None = None
        self._stdin_closing = False
        self._stdin_copying = trio.CancelScope()
        self._stdout: Copier | None = None
        self._stderr: Copier | None = None
        self._logger: Logger | None = None
        self._scope = trio.CancelScope()
        self._running = False
        self._finished = trio.Event()

    async def open(self) -> None:
        """Open everything, without waiting for the client's ends.

        Raises:
            InvalidArgument: something cannot be opened; nothing stays open then.
        """
        try:
            if self.plan.stdin:
                self._stdin = FifoInput(self.plan.stdin, closing=self._stdin_closing)
            stdout, stderr = await self._open_outputs(self.plan.stdout, self.plan.stderr)
            self._stdout = Copier(f"stdout of {self._process_id}", stdout)
            self._stderr = Copier(f"stderr of {self._process_id}", stderr)
        except BaseException:
            await self.close()
            raise

    async def _open_outputs(self, stdout: Target, stderr: Target) -> tuple[Output, Output]:
        if stdout.kind is Kind.BINARY:
            logger = await open_logger(stdout, container_id=self._process_id, namespace=self._namespace)
            self._logger = logger
            return logger.stdout, logger.stderr
        opened = open_output("stdout", stdout)
        if stdout.kind is Kind.NONE or stdout.path != stderr.path:
            try:
                return opened, open_output("stderr", stderr)
            except InvalidArgument:
                opened.close()
                raise
        shared = Shared(opened, users=2)
        return shared.handle(), shared.handle()

    async def run(self, process: Process) -> None:
        """Copy until all streams have ended, or until `close`. Never raises but when cancelled."""
        self._running = True
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for copier, stream in ((self._stdout, process.stdout), (self._stderr, process.stderr)):
                        if copier is not None and stream is not None:
                            nursery.start_soon(copier.run, stream)
                        elif copier is not None:
                            copier.close()
                    nursery.start_soon(self._copy_stdin, process)
        except Exception:  # a bug, but the process still ends, and whoever waits for it is to be told
            log.exception("copying the streams of %s failed", self._process_id)
        finally:
            self._release()
            self._finished.set()

    async def _copy_stdin(self, process: Process) -> None:
        if self._stdin is None:
            return
        try:
            with self._stdin_copying:
                while process.stdin is not None and (data := await self._stdin.receive_some()):
                    await process.stdin.send_all(data)
                await process.close_stdin()
        except (trio.BrokenResourceError, trio.ClosedResourceError, VCError, OSError) as exc:
            log.debug("stdin of %s ended: %s", self._process_id, exc)
        finally:
            self._stdin.close()

    def close_stdin(self) -> None:
        """CloseIO: nobody writes to stdin any more. Remembered if it comes before `open`."""
        self._stdin_closing = True
        if self._stdin is not None:
            self._stdin.close_writer()

    def process_ended(self) -> None:
        """Stop copying to a process that reads no more."""
        self._stdin_copying.cancel()

    async def wait_copied(self, stdout_bytes: int | None, stderr_bytes: int | None) -> None:
        """Wait until the output up to the exit has reached the client, at most DRAIN_LIMIT."""
        with trio.move_on_after(DRAIN_LIMIT) as scope:
            for copier, count in ((self._stdout, stdout_bytes), (self._stderr, stderr_bytes)):
                if copier is not None:
                    await copier.wait_copied(count)
        if scope.cancelled_caught:
            log.warning("the output of %s is not being read; its exit is reported anyway", self._process_id)

    async def close(self) -> None:
        """Stop copying and give everything back. Safe to call twice, and without `run`."""
        self._scope.cancel()
        if self._running:
            await self._finished.wait()
        self._release()

    async def end_logger(self) -> None:
        """Let the logging program finish, which may take it some seconds. Call it after `close`."""
        if self._logger is not None:
            logger, self._logger = self._logger, None
            await logger.end()

    async def wait_finished(self) -> None:
        """Wait until all streams have ended; at once if `run` was not called."""
        if self._running:
            await self._finished.wait()

    def renewed(self) -> ProcessIO:
        """Return a fresh one for another try, which remembers that stdin was closed."""
        fresh = ProcessIO(self.plan, process_id=self._process_id, namespace=self._namespace)
        fresh._stdin_closing = self._stdin_closing
        return fresh

    def _release(self) -> None:
        if self._stdin is not None:
            self._stdin.close()
        for copier in (self._stdout, self._stderr):
            if copier is not None:
                copier.close()
