"""The real agent as a process of this host, and a client for it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google.protobuf
import trio

from protos.kata import agent_pb2, health_pb2, oci_pb2
from ttrpc import methods
from ttrpc.client import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).resolve().parents[2]
AGENT = methods.service(agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
HEALTH = methods.service(health_pb2.DESCRIPTOR.services_by_name["Health"])
DEADLINE = 20.0  # seconds; a test that waits longer for one thing has failed


def missing() -> str:
    """What an integration test needs and this machine does not have."""
    if os.geteuid() != 0:
        return "root"
    wanted = ("crun", "unshare", "busybox")
    return ", ".join(name for name in wanted if shutil.which(name) is None)


class RunningAgent:
    """The agent as a process of this host, in namespaces of its own."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, log: Path) -> None:
        self.process = process
        self.directory = directory
        self.socket = directory / "agent.sock"
        self.root = directory / "root"
        self.log = log

    @property
    def pid(self) -> int:
        """The agent itself: the only child of unshare."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


def make_rootfs(directory: Path) -> Path:
    """Make a root file system with busybox in it."""
    for name in ("bin", "proc", "dev", "sys", "tmp", "etc"):
        (directory / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, directory / "bin/busybox")
    for name in ("sh", "cat", "echo", "sleep", "dd", "stty", "id", "hostname", "kill", "head", "wc", "true"):
        (directory / "bin" / name).symlink_to("busybox")
    (directory / "bin/notexec").write_text("no program")
    return directory


@contextmanager
def running_agent() -> Iterator[RunningAgent]:
    """Run an agent, whose state is in a directory of its own."""
    directory = Path(tempfile.mkdtemp(prefix="agent-"))  # short: paths of sockets are limited
    log = directory / "log"
    python_path = f"{ROOT}:{Path(google.protobuf.__file__).parents[2]}"
    argv = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--ipc",
        "--uts",
        "--net",
    ]
    argv += [sys.executable, "-S", "-m", "agent"]
    argv += ["--listen", f"unix:{directory}/agent.sock", "--root", f"{directory}/root"]
    with log.open("wb") as file:
        process = subprocess.Popen(argv, stderr=file, env={**os.environ, "PYTHONPATH": python_path})
    yield RunningAgent(process, directory, log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(directory)


async def connect(agent: RunningAgent, port: int = 1024) -> trio.SocketStream:
    """Connect to a port of the agent."""
    with trio.fail_after(DEADLINE):
        while True:
            assert agent.process.poll() is None, agent.log.read_text()
            try:
                stream = await trio.open_unix_socket(str(agent.socket))
                break
            except OSError:
                await trio.sleep(0.01)  # the kernel does not tell when a socket appears
        await stream.send_all(f"CONNECT {port}\n".encode())
        line = b""
        while not line.endswith(b"\n"):
            piece = await stream.receive_some(1)
            assert piece, f"the agent hung up after {line!r}"
            line += piece
    if line != f"OK {port}\n".encode():
        await stream.aclose()
        raise Refused(line.decode())
    return stream


class Refused(Exception):
    """The agent does not serve this port."""


class Guest:
    """Calls of the agent by name, and short forms for what tests do all the time."""

    def __init__(self, client: Client, agent: RunningAgent, rootfs: Path) -> None:
        self.client = client
        self.agent = agent
        self.rootfs = rootfs
        self.streams: list[trio.SocketStream] = []

    async def call(self, name: str, **fields: Any) -> Any:
        """Make a call that must be answered in time."""
        with trio.fail_after(DEADLINE):
            return await self.call_patiently(name, **fields)

    async def call_patiently(self, name: str, **fields: Any) -> Any:
        """Make a call that may stay pending."""
        method = AGENT[name]
        return await self.client.call(method, method.request_class(**fields))

    def process(self, *args: str, **fields: Any) -> oci_pb2.Process:
        """The process part of a spec."""
        fields.setdefault("Env", ["PATH=/bin"])
        fields.setdefault("Cwd", "/")
        return oci_pb2.Process(Args=args, **fields)

    def spec(self, *args: str, **fields: Any) -> oci_pb2.Spec:
        """A spec as a shim sends it: constrained, on the test's root file system."""
        linux = oci_pb2.Linux(
            Namespaces=[oci_pb2.LinuxNamespace(Type=kind) for kind in ("ipc", "uts", "mount")],
            Resources=oci_pb2.LinuxResources(),
        )
        return oci_pb2.Spec(
            Version="1.1.0",
            Process=self.process(*args, **fields),
            Root=oci_pb2.Root(Path=str(self.rootfs)),
            Mounts=[
                oci_pb2.Mount(destination="/proc", type="proc", source="proc"),
                oci_pb2.Mount(
                    destination="/dev",
                    type="tmpfs",
                    source="tmpfs",
                    options=["nosuid", "mode=755", "size=65536k"],
                ),
                oci_pb2.Mount(
                    destination="/dev/pts",
                    type="devpts",
                    source="devpts",
                    options=["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
                ),
            ],
            Linux=linux,
        )

    async def create(self, *args: str, ports: tuple[int, int, int] = (0, 0, 0), **fields: Any) -> str:
        """Create a container; returns its id."""
        container_id = f"c{next(COUNTER)}"
        names = ("stdin_port", "stdout_port", "stderr_port")
        await self.call(
            "CreateContainer",
            container_id=container_id,
            exec_id=container_id,
            OCI=self.spec(*args, **fields),
            **dict(zip(names, ports, strict=True)),
        )
        return container_id

    async def start(self, *args: str, **fields: Any) -> str:
        """Create and start a container; returns its id."""
        container_id = await self.create(*args, **fields)
        await self.call("StartContainer", container_id=container_id)
        return container_id

    async def exec(
        self, container_id: str, *args: str, ports: tuple[int, int, int] = (0, 0, 0), **fields: Any
    ) -> str:
        """Run a process in a container; returns its id."""
        exec_id = f"e{next(COUNTER)}"
        names = ("stdin_port", "stdout_port", "stderr_port")
        await self.call(
            "ExecProcess",
            container_id=container_id,
            exec_id=exec_id,
            process=self.process(*args, **fields),
            **dict(zip(names, ports, strict=True)),
        )
        return exec_id

    async def wait(self, container_id: str, exec_id: str = "") -> Any:
        """The answer of WaitProcess."""
        return await self.call("WaitProcess", container_id=container_id, exec_id=exec_id)

    async def read_all(self, container_id: str, exec_id: str = "", stream: str = "ReadStdout") -> bytes:
        """Everything a process writes, by calls."""
        result = bytearray()
        while piece := (
            await self.call(stream, container_id=container_id, exec_id=exec_id, len=32 << 10)
        ).data:
            result += piece
        return bytes(result)

    async def remove(self, container_id: str) -> None:
        """Remove a container."""
        await self.call("RemoveContainer", container_id=container_id)

    def ports(self) -> tuple[int, int, int]:
        """Three ports that nobody has used."""
        return next(PORTS), next(PORTS), next(PORTS)

    async def dial(self, port: int) -> trio.SocketStream:
        """Connect to the port of a stream."""
        stream = await connect(self.agent, port)
        self.streams.append(stream)
        return stream


COUNTER = itertools.count(1)
PORTS = itertools.count(0x10000)


@asynccontextmanager
async def connected(agent: RunningAgent, rootfs: Path) -> AsyncIterator[Guest]:
    """A client of the agent."""
    async with trio.open_nursery() as nursery:
        client = Client(await connect(agent))
        nursery.start_soon(client.run)
        guest = Guest(client, agent, rootfs)
        yield guest
        for stream in guest.streams:
            await stream.aclose()
        nursery.cancel_scope.cancel()


async def receive_all(stream: trio.SocketStream) -> bytes:
    """Everything until the end of a stream."""
    result = bytearray()
    with trio.fail_after(DEADLINE):
        while piece := await stream.receive_some(1 << 20):
            result += piece
    return bytes(result)
