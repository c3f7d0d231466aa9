"""A VMM that the test plays, and an agent in it that misbehaves where a test tells it to.

The runtime is configured with a program that is no QEMU: it hands QEMU's descriptors and command line to the
test and lives until it is killed. So the whole host is real (driver, virtiofsd, transports, agent client,
sandbox, shim) and what a guest can send comes from the test: bytes on the console, on the agent's line, in
QMP. An `Agent` behaves well by itself; a test replaces what it wants by one of its own steps.
"""

from __future__ import annotations

import array
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
from google.protobuf.message import Message

from protos.kata import agent_pb2, health_pb2
from protos.ttrpc import ttrpc_pb2
from tests.harness.shim_process import ShimProcess
from ttrpc import methods
from ttrpc.frames import REQUEST, RESPONSE, Decoder, Frame, encode_frame
from vc.agent_client.client import AGENT_PORT, STREAMS_FEATURE
from vc.unixsock import listen
from yamux.resync import Responder
from yamux.session import Session

AGENT = methods.service(agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
HEALTH = methods.service(health_pb2.DESCRIPTOR.services_by_name["Health"])
SERVING = health_pb2.HealthCheckResponse.SERVING
RATE = 10.0  # how much faster than the world's the shim's clock runs
MEMORY_LIMIT = 32 << 20  # bytes by which no guest may make the shim grow
MAX_COMMAND_LINE = 64 << 10  # bytes
# The last if a test writes on a line while the session that it breaks does so, too.
BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)

PROGRAM = """\
#!{python} -IS
import socket, sys
line = "\\0".join(sys.argv).encode()
control = socket.socket(socket.AF_UNIX)
control.connect({path!r})
numbers = [int(word[3:]) for option in sys.argv for word in option.split(",") if word[:3] == "fd="]
socket.send_fds(control, [line], numbers)
control.recv(1)
"""


class Machine:
    """One started VMM: its descriptors, by the names on its command line."""

    def __init__(self, control: trio.SocketStream, argv: list[str], descriptors: dict[str, int]) -> None:
        self.control = control
        self.argv = argv
        self.agent = socket.socket(fileno=descriptors.pop("agent"))
        self.qmp = socket.socket(fileno=descriptors.pop("qmp"))
        self.console = trio.SocketStream(
            trio.socket.from_stdlib_socket(socket.socket(fileno=descriptors.pop("console")))
        )
        self.others = [socket.socket(fileno=number) for number in descriptors.values()]

    @property
    def vmid(self) -> str:
        """The id in the command line."""
        return self.argv[self.argv.index("-name") + 1].partition(",")[0].removeprefix("sandbox-")

    async def line(self) -> trio.SocketStream:
        """Wait until the host opens the agent's serial line, which it may do again after it has closed it."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self.agent.dup()))
        async with listener:
            return await listener.accept()

    def close(self) -> None:
        """Give the descriptors back; the program ends."""
        self.control.socket.close()
        for sock in (self.agent, self.qmp, *self.others):
            sock.close()
        self.console.socket.close()


class VMM:
    """The program that is started instead of QEMU, and what it hands over."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "vmm"
        self._control = directory / "control"
        self.path.write_text(PROGRAM.format(python=sys.executable, path=str(self._control)))
        self.path.chmod(0o755)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[trio.SocketListener]:
        """Take machines for the length of the block."""
        self._control.unlink(missing_ok=True)
        sock = listen(self._control)
        async with trio.SocketListener(trio.socket.from_stdlib_socket(sock)) as listener:
            yield listener

    async def started(self, listener: trio.SocketListener) -> Machine:
        """Wait for the next start of a machine."""
        control = await listener.accept()
        space = socket.CMSG_SPACE(16 * array.array("i").itemsize)
        data, ancillary, _, _ = await control.socket.recvmsg(MAX_COMMAND_LINE, space)
        numbers = array.array("i", b"".join(item[2] for item in ancillary))
        argv = data.decode().split("\0")
        names = re.findall(r"id=([\w-]+),fd=\d+", " ".join(argv))
        return Machine(control, argv, dict(zip(names, numbers, strict=True)))


@dataclass(frozen=True, slots=True)
class Call:
    """One request, and the connection that it came on."""

    agent: Agent
    stream: trio.abc.HalfCloseableStream
    lock: trio.Lock  # one frame at a time
    stream_id: int
    name: str
    request: Message

    async def answer(self, message: Message) -> None:
        """Answer it well."""
        await self.send(ttrpc_pb2.Response(payload=message.SerializeToString()))

    async def fail(self, code: int, text: str) -> None:
        """Answer it with a status."""
        await self.send(ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=code, message=text)))

    async def send(self, response: ttrpc_pb2.Response) -> None:
        """Answer it with these very fields."""
        await self.raw(encode_frame(self.stream_id, RESPONSE, 0, response.SerializeToString()))

    async def raw(self, data: bytes) -> None:
        """Write bytes instead of an answer."""
        async with self.lock:
            await self.stream.send_all(data)

    def default(self) -> Message:
        """What a good agent answers where nothing is to be said."""
        table = HEALTH if self.name == "Check" else AGENT
        if self.name == "Check":
            return health_pb2.HealthCheckResponse(status=SERVING)
        if self.name == "GetGuestDetails":
            features = [STREAMS_FEATURE] if self.agent.streams else []
            details = agent_pb2.AgentDetails(version="hostile", extra_features=features)
            return agent_pb2.GuestDetailsResponse(agent_details=details)
        return table[self.name].response_class()


Answer = Callable[[Call], Awaitable[None]]
OnLine = Callable[["Agent", trio.SocketStream], Awaitable[None]]
OnPort = Callable[["Agent", trio.abc.HalfCloseableStream, int], Awaitable[None]]


@dataclass
class Agent:
    """An agent as the host expects it, but for what is given."""

    answers: dict[str, Answer] = field(default_factory=dict)  # by the name of the call
    on_line: OnLine | None = None  # instead of the handshake and all behind it
    on_connect: OnPort | None = None  # instead of the answer to CONNECT and all behind it
    on_stdio: OnPort | None = None  # what is done with a process's stream; by itself it stays open and silent
    streams: bool = True  # each stdio stream has a connection of its own
    killed: trio.Event = field(default_factory=trio.Event)  # by SIGKILL
    calls: list[str] = field(default_factory=list)  # that came
    started: trio.Event = field(default_factory=trio.Event)
    machine: Machine | None = None  # once it is started
    line: trio.SocketStream | None = None  # once there is a session on it

    async def run(self, machine: Machine) -> None:
        """Serve the host until it closes the line."""
        while True:
            line = await machine.line()
            try:
                await _forgiving(self.on_line or shake_hands_and_serve, self, line)
            finally:
                await trio.aclose_forcefully(line)

    async def serve_line(self, line: trio.SocketStream, first: bytes) -> None:
        """Carry a session whose first bytes are these."""
        session = Session(line, client=False, first_bytes=first)
        self.line = line
        async with trio.open_nursery() as nursery:
            await nursery.start(session.run)
            while True:
                nursery.start_soon(_forgiving, self._greet, await session.accept_stream())

    async def _greet(self, stream: trio.abc.HalfCloseableStream) -> None:
        line = b""
        while not line.endswith(b"\n"):
            piece = await stream.receive_some(1)
            if not piece:
                return
            line += piece
        port = int(line.split()[1])
        if self.on_connect is not None:
            await self.on_connect(self, stream, port)
            return
        await stream.send_all(b"OK %d\n" % port)
        if port == AGENT_PORT:
            await self._serve_calls(stream)
        elif self.on_stdio is not None:
            await self.on_stdio(self, stream, port)

    async def _serve_calls(self, stream: trio.abc.HalfCloseableStream) -> None:
        decoder, lock = Decoder(), trio.Lock()
        async with trio.open_nursery() as nursery:
            while data := await stream.receive_some(65536):
                for frame in decoder.receive_data(data):
                    if isinstance(frame, Frame) and frame.kind == REQUEST:
                        nursery.start_soon(_forgiving, self._answer, stream, lock, frame)

    async def _answer(self, stream: trio.abc.HalfCloseableStream, lock: trio.Lock, frame: Frame) -> None:
        request = ttrpc_pb2.Request.FromString(frame.data)
        table = HEALTH if request.service.endswith("Health") else AGENT
        message = table[request.method].request_class.FromString(request.payload)
        call = Call(self, stream, lock, frame.stream_id, request.method, message)
        self.calls.append(call.name)
        await self.answers.get(call.name, DEFAULTS.get(call.name, _answer_well))(call)


async def shake_hands_and_serve(agent: Agent, line: trio.SocketStream) -> None:
    """Begin a session as a guest does, and serve it."""
    responder = Responder()
    while not responder.receive_data(bytes(await line.receive_some(4096))):
        pass
    await line.send_all(responder.data_to_send())
    await agent.serve_line(line, responder.trailing_data)


async def _answer_well(call: Call) -> None:
    await call.answer(call.default())


async def never(call: Call) -> None:
    """Do not answer."""
    await trio.sleep_forever()


async def _note_signal(call: Call) -> None:
    assert isinstance(call.request, agent_pb2.SignalProcessRequest)
    if call.request.signal == 9:
        call.agent.killed.set()
    await _answer_well(call)


async def _wait_killed(call: Call) -> None:
    await call.agent.killed.wait()
    await call.answer(agent_pb2.WaitProcessResponse(status=137))


async def _power_off(call: Call) -> None:
    await _answer_well(call)
    assert call.agent.machine is not None
    call.agent.machine.control.socket.close()


DEFAULTS: dict[str, Answer] = {
    "DestroySandbox": _power_off,
    "GetOOMEvent": never,
    "SignalProcess": _note_signal,
    "WaitProcess": _wait_killed,
}


async def _forgiving(step: Callable[..., Awaitable[None]], *args: object) -> None:
    """Do a step; that the host has hung up meanwhile is its end."""
    try:
        await step(*args)
    except* BROKEN:
        pass


class Host:
    """A shim that serves, and the VMM that it is configured with. A test that fails costs it its life."""

    def __init__(self, vmm: VMM, serve: Callable[[], AbstractContextManager[ShimProcess]]) -> None:
        self._vmm = vmm
        self._serve = serve
        self._running = ExitStack()
        self._shim = self._running.enter_context(serve())

    def close(self) -> None:
        """End the shim, and whatever it has."""
        self._running.close()

    def _replace(self) -> None:
        self.close()
        self._shim = self._running.enter_context(self._serve())

    @asynccontextmanager
    async def playing(self, agent: Agent) -> AsyncIterator[ShimProcess]:
        """Give the shim whose next VM has this agent in it."""
        async with self._vmm.listening() as listener, self._shim.connected(), trio.open_nursery() as nursery:
            nursery.start_soon(self._play, listener, agent)
            yield self._shim
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def guest(self, agent: Agent, *, memory: int = MEMORY_LIMIT) -> AsyncIterator[ShimProcess]:
        """Do the same. In the end the shim must be as it was before.

        It has taken at most `memory` bytes more meanwhile, has logged nothing but readable lines, and no bug.
        """
        try:
            shim = self._shim
            before, logged, resident = shim.holds(), len(shim.log), shim.forget_peak()
            async with self.playing(agent):
                yield shim
            left = shim.left_over(before)
            log = shim.log[logged:]
            assert not left, "left behind:\n" + "\n".join(left)
            assert "Traceback" not in log, log
            assert all(line.isprintable() for line in log.splitlines()), log
            assert shim.peak() - resident < memory, f"{(shim.peak() - resident) >> 20} MiB"
        except BaseException:
            self._replace()
            await self.live_once()
            raise

    async def _play(self, listener: trio.SocketListener, agent: Agent) -> None:
        machine = await self._vmm.started(listener)
        try:
            agent.machine = machine
            agent.started.set()
            await agent.run(machine)
        finally:
            machine.close()

    async def live_once(self) -> None:
        """Have a pod from Create to Delete, with a guest that behaves."""
        async with self.playing(Agent()) as shim:
            await shim.call("Create", **shim.creation())
            await shim.call("Start", id="c1")
            await shim.call("Kill", id="c1", signal=9)
            await shim.call("Wait", id="c1")
            await shim.call("Delete", id="c1")
            await shim.until("/tasks/delete")
