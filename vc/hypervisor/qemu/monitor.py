"""QMP over trio: commands to QEMU with their answers, and its events, on one connected socket.

`qmp` knows the protocol; this file moves its bytes. There is a library, qemu.qmp, but it wants asyncio, and
to import both takes as long as QEMU takes to start: a VM that goes on from a saved state is commanded at
once, and one that has waited for its owner has nothing else to wait for.

The rule: every command ends. It is answered, it runs out of time, or QEMU dies and it fails at once.
"""

from __future__ import annotations

import array
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from vc.background import background
from vc.errors import HypervisorError, Timeout
from vc.hypervisor.qemu.qmp import Command, Connection, Event, Ready, RemoteProtocolError, Reply

COMMAND_TIMEOUT = 10.0  # seconds; QEMU answers in less than one unless its main loop hangs
READ_SIZE = 64 << 10  # bytes


class _Call:
    """A command that waits for its answer."""

    def __init__(self) -> None:
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
        self._socket = trio.socket.from_stdlib_socket(connection)
        self._on_event = on_event
        self._protocol = Connection()
        self._pending: dict[int, _Call] = {}
        self._sending = trio.Lock()
        self._settled = trio.Event()  # QEMU takes commands, or it never will
        self._failure = ""
        self.ended = trio.Event()  # nothing comes any more

    async def execute(
        self, command: Command, *, descriptor: int | None = None, timeout: float = COMMAND_TIMEOUT
    ) -> object:
        """Give a command, once QEMU listens, and return its result. `descriptor` is sent along with it.

        Raises:
            HypervisorError: QEMU refused, or it is dead.
            Timeout: no answer; QEMU may still do it.

        """
        with trio.move_on_after(timeout) as scope:
            await self._settled.wait()
            call = await self._give(command, descriptor)
        if scope.cancelled_caught:
            raise Timeout(f"QMP command {command.name}: no answer from QEMU within {timeout:g} s")
        if call.error:
            raise HypervisorError(f"QMP command {command.name}: {call.error}")
        return call.result

    async def _give(self, command: Command, descriptor: int | None) -> _Call:
        call = _Call()
        if self._failure:
            call.finish(None, self._failure)
            return call
        number, data = self._protocol.command(command)
        self._pending[number] = call
        try:
            try:
                await self._send(data, descriptor)
            except (OSError, trio.ClosedResourceError) as exc:
                call.finish(None, f"QEMU does not take it: {exc}")
            await call.done.wait()
        finally:
            del self._pending[number]
        return call

    async def _send(self, data: bytes, descriptor: int | None) -> None:
        """Send all of a command. One that was cut in the middle would spoil all that come after it."""
        rights = [] if descriptor is None else [array.array("i", [descriptor])]
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, one) for one in rights]
        async with self._sending:
            sent = 0
            try:
                while sent < len(data):
                    sent += await self._socket.sendmsg([data[sent:]], ancillary if not sent else [])
            finally:
                if 0 < sent < len(data):
                    self.fail("a command was given only in part")

    def fail(self, cause: str) -> None:
        """Make pending and later commands fail at once. Called again with a better cause, it replaces it."""
        self._failure = cause
        self._settled.set()
        for call in self._pending.values():
            call.finish(None, cause)

    async def attend(self) -> None:
        """Read what QEMU says until it ends the connection."""
        end = "QEMU closed its monitor"
        try:
            while data := await self._socket.recv(READ_SIZE):
                for message in self._protocol.receive_data_untrusted(data):
                    self._take(message)
                if owed := self._protocol.data_to_send():
                    await self._send(owed, None)
        except RemoteProtocolError as exc:
            end = f"QEMU does not speak QMP: {exc}"
        except (OSError, trio.ClosedResourceError) as exc:
            end = f"the connection to QEMU broke: {exc}"
        finally:
            self._socket.close()
            self.fail(self._failure or end)
            self.ended.set()

    def _take(self, message: Ready | Reply | Event) -> None:
        if isinstance(message, Ready):
            self._settled.set()
        elif isinstance(message, Reply):
            if (call := self._pending.get(message.number)) is not None:  # else it ran out of time
                call.finish(message.result, message.error)
        else:
            self._on_event(message)


@asynccontextmanager
async def monitoring(connection: socket.socket, on_event: Callable[[Event], None]) -> AsyncIterator[Monitor]:
    """Speak QMP on a connected socket, which is closed in the end. Does not wait until QEMU answers."""
    monitor = Monitor(connection, on_event)
    async with background() as nursery:
        nursery.start_soon(monitor.attend)
        yield monitor
