"""QMP for trio: the library qemu.qmp, which wants asyncio, in a thread of its own.

The thread starts when QEMU was started, and imports asyncio and the library while QEMU boots: 40 ms that
nobody waits for. Commands cross over with `call_soon_threadsafe`, results and events come back with trio's
token. The thread ends when the connection does, and the connection ends when QEMU does.

The rule: every command ends. It is answered, it runs out of time, or QEMU dies and it fails at once.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from vc.errors import HypervisorError, Timeout
from vc.hypervisor.qemu.qmp import EVENT_NAMES, Command, Event, parse_event_untrusted

if TYPE_CHECKING:
    import asyncio

    from qemu.qmp import EventListener, QMPClient

COMMAND_TIMEOUT = 10.0  # seconds; QEMU answers in less than one unless its main loop hangs
END_GRACE = 2.0  # seconds for the thread to notice that it is to end


class _Call:
    """A command on its way: made in trio, run in asyncio, finished in trio."""

    def __init__(self, command: Command, descriptor: int | None) -> None:
        self.command = command
        self.descriptor = descriptor
        self.task: asyncio.Task[None] | None = None  # touched by the thread only
        self.done = trio.Event()
        self.result: object = None
        self.error = ""

    def finish(self, result: object, error: str) -> None:
        if not self.done.is_set():
            self.result, self.error = result, error
            self.done.set()


class Monitor:
    """A QMP connection. Made by `monitoring`."""

    def __init__(self, connection: socket.socket, on_event: Callable[[Event], None]) -> None:
        self._connection = connection
        self._on_event = on_event
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._run_thread, name="qmp", daemon=True)
        self._pending: set[_Call] = set()
        self._settled = trio.Event()  # connected, or it never will be
        self._failure = ""
        self.ended = trio.Event()  # the thread is about to return
        # Shared with the thread
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._stopping = False

    # In trio

    async def execute(
        self, command: Command, *, descriptor: int | None = None, timeout: float = COMMAND_TIMEOUT
    ) -> object:
        """Give a command, once QEMU listens, and return its result. `descriptor` is sent along with it.

        Raises:
            HypervisorError: QEMU refused, or it is dead.
            Timeout: no answer; QEMU may still do it.

        """
        call = _Call(command, descriptor)
        with trio.move_on_after(timeout) as scope:
            await self._settled.wait()
            if self._failure:
                raise HypervisorError(f"QMP command {command.name}: {self._failure}")
            self._pending.add(call)
            try:
                self._call_soon(lambda: self._start(call))
                await call.done.wait()
            finally:
                self._pending.discard(call)
                if not call.done.is_set():
                    self._call_soon(lambda: call.task and call.task.cancel())
        if scope.cancelled_caught:
            raise Timeout(f"QMP command {command.name}: no answer from QEMU within {timeout:g} s")
        if call.error:
            raise HypervisorError(f"QMP command {command.name}: {call.error}")
        return call.result

    def fail(self, cause: str) -> None:
        """Make pending and later commands fail at once. Called again with a better cause, it replaces it."""
        self._failure = cause
        self._settled.set()
        for call in self._pending:
            call.finish(None, self._failure)

    def _call_soon(self, function: Callable[[], object]) -> None:
        loop = self._loop
        assert loop is not None  # it is set before `_settled`
        with contextlib.suppress(RuntimeError):  # the loop was closed; `fail` was called or is about to be
            loop.call_soon_threadsafe(function)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """End the thread, and wait for that."""
        with self._lock:
            self._stopping = True
            if self._loop is not None and self._main is not None:
                with contextlib.suppress(RuntimeError):  # it has ended by itself
                    self._loop.call_soon_threadsafe(self._main.cancel)
        with trio.move_on_after(END_GRACE, shield=True):
            await self.ended.wait()
            self._thread.join(END_GRACE)

    # In the thread

    def _call_trio(self, function: Callable[[], object]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function)

    def _run_thread(self) -> None:
        end = ""
        try:
            import asyncio

            with contextlib.suppress(asyncio.CancelledError):
                end = asyncio.run(self._session())
        except Exception as exc:  # whatever it is, it must be told to the commands that wait
            logging.getLogger(__name__).exception("the QMP thread failed")
            end = f"the QMP thread failed: {exc!r}"
        finally:
            self._connection.close()
            self._call_trio(lambda: self.fail(self._failure or end or "the connection to QEMU was closed"))
            self._call_trio(self.ended.set)

    async def _session(self) -> str:
        """Connect, and stay connected until QEMU or `stop` ends it; returns why it ended."""
        import asyncio

        from qemu.qmp import EventListener, QMPClient, QMPError, Runstate

        # Its errors are our exceptions; told a second time by logging's last resort, they would go to stderr.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        with self._lock:
            self._loop = asyncio.get_running_loop()
            self._loop.set_exception_handler(_note_unasked)
            self._main = asyncio.current_task()
            if self._stopping:
                return "stopped"
        self._client: QMPClient = QMPClient("vmm")
        try:
            await self._client.connect(self._connection)
        except QMPError as exc:
            return f"QEMU did not open its monitor: {exc}"
        except AssertionError:  # the library's: the connection ended in the moment in which it was open
            with contextlib.suppress(Exception):
                await self._client.disconnect()
            return "QEMU closed its monitor"
        self._call_trio(self._settled.set)
        listener = EventListener(names=EVENT_NAMES)
        with self._client.listen(listener):
            events = asyncio.create_task(self._forward(listener))
            try:
                while self._client.runstate is Runstate.RUNNING:
                    await self._client.runstate_changed()
            finally:
                # The last event comes with the end of the connection; one turn of the loop hands it over.
                await asyncio.sleep(0)
                events.cancel()
                with contextlib.suppress(Exception):  # how it ended is of no interest, QEMU's death is
                    await self._client.disconnect()
        return "QEMU closed its monitor"

    async def _forward(self, listener: EventListener) -> None:
        async for message in listener:
            event = parse_event_untrusted(message)
            if event is not None:
                self._call_trio(lambda event=event: self._on_event(event))  # type: ignore[misc]

    def _start(self, call: _Call) -> None:
        import asyncio

        call.task = asyncio.ensure_future(self._execute(call))

    async def _execute(self, call: _Call) -> None:
        from qemu.qmp import QMPError

        try:
            if call.descriptor is not None:
                self._client.send_fd_scm(call.descriptor)
            result = await self._client.execute(call.command.name, dict(call.command.arguments))
        except (QMPError, OSError) as exc:
            error = str(exc) or type(exc).__name__
            self._call_trio(lambda: call.finish(None, error))
        else:
            self._call_trio(lambda: call.finish(result, ""))


@asynccontextmanager
async def monitoring(connection: socket.socket, on_event: Callable[[Event], None]) -> AsyncIterator[Monitor]:
    """Speak QMP on a connected socket, which is closed in the end. Does not wait until QEMU answers."""
    monitor = Monitor(connection, on_event)
    monitor.start()
    try:
        yield monitor
    finally:
        await monitor.stop()


def _note_unasked(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what nobody asked a task for.

    The library forgets its own tasks if the connection ends while we hang up: that is no error to tell about.
    """
    if isinstance(context.get("exception"), (EOFError, OSError)):
        logging.getLogger(__name__).debug("QMP: %s", context)
    else:
        loop.default_exception_handler(context)
