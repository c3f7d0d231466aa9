"""One process in a container: its life, its exit and its three streams.

A process knows how to reach its own stdio, by streams of its own where the agent has them and by the agent's
read and write calls elsewhere; whoever copies the bytes sees `trio.abc` streams and cannot tell. It is
watched by a task of the sandbox, so that its exit is known without anybody waiting for it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio

from vc.agent_client.client import AgentClient, together
from vc.errors import GuestGone, NotFound, VCError, WrongState
from vc.states import ProcessState

KILLED_STATUS = 137  # 128 + SIGKILL: what a process gets whose VM died under it
LOST_STATUS = 255  # containerd's word for an exit that nobody saw
READ_SIZE = 256 << 10  # bytes asked from ReadStdout at once; far below ttrpc's 4 MiB message limit


@dataclass(frozen=True, slots=True)
class StdioRequest:
    """Which of its streams a process is to have. With a terminal there is no stderr."""

    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    terminal: bool = False


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended. The byte counts are None where the agent does not know them."""

    status: int
    at: float  # seconds since the epoch
    cause: str = ""  # why, if it was not the process's own doing
    stdout_bytes: int | None = None
    stderr_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of a process's stdio streams; 0 where there is none."""

    stdin: int = 0
    stdout: int = 0
    stderr: int = 0


class CallReader(trio.abc.ReceiveStream):
    """Output by ReadStdout or ReadStderr: the path that every agent has."""

    def __init__(self, agent: AgentClient, call: str, container_id: str, exec_id: str) -> None:
        self._agent = agent
        self._call = call
        self._container_id = container_id
        self._exec_id = exec_id
        self._ended = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return the next bytes, or empty at the end. An agent may also end a stream with an error."""
        if self._ended:
            return b""
        size = READ_SIZE if max_bytes is None else min(max_bytes, READ_SIZE)
        try:
            data = await self._agent.read_output(self._call, self._container_id, self._exec_id, size)
        except GuestGone as exc:
            raise trio.BrokenResourceError(str(exc)) from exc
        except VCError:
            data = b""
        self._ended = not data
        return data

    async def aclose(self) -> None:
        """Stop reading. The agent keeps what is unread until the process is removed."""
        self._ended = True
        await trio.lowlevel.checkpoint()


class CallWriter(trio.abc.SendStream):
    """stdin by WriteStdin and CloseStdin."""

    def __init__(self, agent: AgentClient, container_id: str, exec_id: str) -> None:
        self._agent = agent
        self._container_id = container_id
        self._exec_id = exec_id
        self._closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything; the agent may take it in parts."""
        if self._closed:
            raise trio.ClosedResourceError("this stdin is closed")
        view = memoryview(data)
        try:
            while view:
                piece = bytes(view[:READ_SIZE])
                taken = await self._agent.write_stdin(self._container_id, self._exec_id, piece)
                if not 0 < taken <= len(piece):
                    raise trio.BrokenResourceError(f"the agent took {taken} of {len(piece)} bytes of stdin")
                view = view[taken:]
        except VCError as exc:
            raise trio.BrokenResourceError(f"stdin of the process is gone: {exc}") from exc

    async def wait_send_all_might_not_block(self) -> None:
        """Return at once: every call asks the agent anyway."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Make the process read the end of its stdin."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            await self._agent.close_stdin(self._container_id, self._exec_id)
        except VCError:
            pass  # the process or the guest is gone, and with it the stdin


class Process:
    """A process of a container; the init process has an empty `exec_id`."""

    def __init__(
        self,
        agent: AgentClient,
        container_id: str,
        exec_id: str,
        stdio: StdioRequest,
        launch: Callable[[Ports], Awaitable[None]],
        *,
        streams: bool,
    ) -> None:
        """`launch` makes the guest run it; `streams`: each stdio stream has a connection of its own."""
        self.container_id = container_id
        self.exec_id = exec_id
        self.stdio = stdio
        self.state = ProcessState.CREATED
        self.stdin: trio.abc.SendStream | None = None
        self.stdout: trio.abc.ReceiveStream | None = None
        self.stderr: trio.abc.ReceiveStream | None = None
        self._agent = agent
        self._launch = launch
        self.ports: Ports | None = None  # set if the agent was told them when the container was created
        self._streams = streams
        self._exit: Exit | None = None
        self._exited = trio.Event()

    @property
    def exit(self) -> Exit | None:
        """How it ended, or None while it has not."""
        return self._exit

    def choose_ports(self) -> Ports:
        """Reserve a port for each stream, also for those that nobody wants: they must be read, too."""
        if not self._streams:
            return Ports()
        return Ports(
            stdin=self._agent.new_port() if self.stdio.stdin or not self.stdio.terminal else 0,
            stdout=self._agent.new_port(),
            stderr=self._agent.new_port() if not self.stdio.terminal else 0,
        )

    async def start(self, nursery: trio.Nursery) -> None:
        """Run it, connect its streams, and watch for its exit in `nursery`.

        Raises:
            WrongState: it was started before.
            VCError: the guest's reason why it cannot run; the process stays created.
        """
        if self.state is not ProcessState.CREATED:
            raise WrongState(f"{self} is {self.state.value}, so it cannot be started")
        self.state = ProcessState.STARTING
        try:
            if self.ports is None:
                ports = self.choose_ports()
                await self._launch(ports)
                await self._connect(ports)
            else:
                ports = self.ports
                await together(lambda: self._launch(ports), lambda: self._connect(ports))
        except BaseException:
            self.state = ProcessState.CREATED
            await self._close_streams()
            raise
        self.state = ProcessState.RUNNING
        nursery.start_soon(self._watch)
        await self._null_unwanted(nursery)

    async def _connect(self, ports: Ports) -> None:
        if not self._streams:
            self.stdin = CallWriter(self._agent, self.container_id, self.exec_id)
            self.stdout = CallReader(self._agent, "ReadStdout", self.container_id, self.exec_id)
            if not self.stdio.terminal:
                self.stderr = CallReader(self._agent, "ReadStderr", self.container_id, self.exec_id)
            return
        numbers = {"stdin": ports.stdin, "stdout": ports.stdout, "stderr": ports.stderr}
        await together(*(partial(self._dial, name, port) for name, port in numbers.items() if port))

    async def _dial(self, name: str, port: int) -> None:
        setattr(self, name, await self._agent.dial(port))

    async def _null_unwanted(self, nursery: trio.Nursery) -> None:
        """Do for streams that nobody asked for what /dev/null would: input ends, output goes nowhere.

        In the guest they are pipes: unread, they would block the process sooner or later.
        """
        unwanted = []
        if not self.stdio.stdout and self.stdout is not None:
            unwanted.append(self.stdout)
            self.stdout = None
        if not self.stdio.stderr and self.stderr is not None:
            unwanted.append(self.stderr)
            self.stderr = None
        for output in unwanted:
            nursery.start_soon(_discard, output)
        if not self.stdio.stdin and self.stdin is not None:
            stdin, self.stdin = self.stdin, None
            if not self.stdio.terminal:
                try:
                    await stdin.aclose()
                except trio.BrokenResourceError:
                    pass  # the process has ended before

    async def _close_streams(self) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                await trio.aclose_forcefully(stream)

    async def _watch(self) -> None:
        """Wait for the exit as long as it takes. Whatever happens, the waiters get an answer."""
        try:
            answer = await self._agent.wait_process(self.container_id, self.exec_id)
        except GuestGone as exc:
            self.set_exit(Exit(KILLED_STATUS, time.time(), str(exc)))
        except NotFound as exc:
            self.set_exit(Exit(LOST_STATUS, time.time(), f"the guest lost the exit of {self}: {exc}"))
        except VCError as exc:
            self.set_exit(Exit(LOST_STATUS, time.time(), f"waiting for {self} failed: {exc}"))
        else:
            self.set_exit(
                Exit(
                    answer.status & 0xFF,
                    time.time(),
                    stdout_bytes=answer.stdout_bytes if answer.HasField("stdout_bytes") else None,
                    stderr_bytes=answer.stderr_bytes if answer.HasField("stderr_bytes") else None,
                )
            )
        if self.stdin is not None:
            # The guest waits for more of it, with a thread, until it is told that there is no more.
            await trio.aclose_forcefully(self.stdin)

    def set_exit(self, how: Exit) -> None:
        """Resolve all waits. The first exit stays."""
        if self._exit is None:
            self._exit = how
            self.state = ProcessState.STOPPED
            self._exited.set()

    async def wait(self) -> Exit:
        """Block until the process ended; any number of callers, before or after."""
        await self._exited.wait()
        assert self._exit is not None
        return self._exit

    async def signal(self, signal: int) -> None:
        """Send a signal to this process alone (SIGKILL to the init process reaches the whole container).

        Raises:
            NotFound: it has ended.
            WrongState: it does not run yet.
        """
        if self.state is ProcessState.STOPPED:
            raise NotFound(f"{self} has ended")
        if self.state is ProcessState.CREATED and self.exec_id:
            raise WrongState(f"{self} was not started")
        await self._agent.signal_process(self.container_id, self.exec_id, signal)

    async def resize(self, *, columns: int, rows: int) -> None:
        """Set the size of its terminal, in characters."""
        await self._agent.resize_terminal(self.container_id, self.exec_id, columns=columns, rows=rows)

    async def close_stdin(self) -> None:
        """Make it read the end of its stdin."""
        if self.stdin is not None:
            await self.stdin.aclose()

    def __str__(self) -> str:
        what = f"process {self.exec_id!r}" if self.exec_id else "the init process"
        return f"{what} of container {self.container_id!r}"


async def _discard(output: trio.abc.ReceiveStream) -> None:
    """Read to the end, and close."""
    try:
        async with output:
            async for _ in output:
                pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # the guest is gone, and the output with it
