"""A serving shim as a process of its own, without a containerd: the test calls it and takes its events.

Its clock runs faster than the world's, so that its limits of seconds and minutes can be waited for. All else
is as containerd starts it. Run as a program, this module is that process.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import trio
import trio.testing
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty

from protos.containerd import events_pb2, task_v2_pb2, ttrpc_events_pb2
from protos.containerd.runtimeoptions_pb2 import Options
from shim import kernel, logs, serve
from shim.args import Args
from tests.harness.processes import MARK, kill, processes_of
from ttrpc import methods
from ttrpc.client import Client
from ttrpc.server import Server
from ttrpc.status import StatusError
from vc.unixsock import listen

ROOT = Path(__file__).resolve().parents[2]
TASK = methods.service(task_v2_pb2.DESCRIPTOR.services_by_name["Task"])
DELETED = "/tasks/delete"
OPTIONS = Options.DESCRIPTOR.full_name
LIMIT = 30.0  # seconds of the world; a call that takes longer hangs
SETTLE = 10.0  # seconds of the world in which everything must be gone
INTERVAL = 0.02


@dataclass
class ShimProcess:
    """One serving process, for any number of pods one after the other."""

    directory: Path
    process: subprocess.Popen[bytes]
    events: list[tuple[str, Any]] = field(default_factory=list)
    client: Client | None = None
    _event_came: trio.Event = field(default_factory=trio.Event)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return (self.directory / "log").read_text(errors="surrogateescape")

    @property
    def run_dir(self) -> Path:
        return self.directory / "vc"

    async def call(self, name: str, **fields: Any) -> Any:
        """Make a call, which must be answered in time.

        After a Delete its event has come, too: the next test counts its own.
        """
        assert self.client is not None
        deleted = sum(topic == DELETED for topic, _ in self.events)
        with trio.fail_after(LIMIT):
            answer = await self.client.call(TASK[name], TASK[name].request_class(**fields))
        if name == "Delete":
            await self.until(DELETED, count=deleted + 1)
        return answer

    async def refusal(self, name: str, **fields: Any) -> StatusError:
        """Make a call that must fail, and return how."""
        try:
            answer = await self.call(name, **fields)
        except StatusError as exc:
            return exc
        raise AssertionError(f"{name} succeeded: {answer}")

    def creation(
        self, *, config: str = "", annotations: Mapping[str, str] = MappingProxyType({}), **fields: Any
    ) -> dict[str, Any]:
        """Return the fields of a Create of `c1` with a fresh bundle; `config` names another configuration."""
        options = None
        if config:
            path = str(self.directory / config)
            options = AnyMessage(type_url=OPTIONS, value=Options(config_path=path).SerializeToString())
        return {"id": "c1", "bundle": str(self.bundle(annotations)), "options": options, **fields}

    def bundle(self, annotations: Mapping[str, str]) -> Path:
        """Make a bundle with a root of its own; a process in it would run `true`."""
        path = self.directory / f"bundle-{self.process.pid}-{next(self._numbers)}"
        (path / "rootfs").mkdir(parents=True)
        process = {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}}
        spec = {"ociVersion": "1.0.2", "process": process, "root": {"path": "rootfs"}}
        (path / "config.json").write_text(json.dumps({**spec, "annotations": dict(annotations)}))
        return path

    async def until(self, topic: str, count: int = 1) -> list[Any]:
        """Wait until so many events of a topic have come since the client connected; return them."""
        with trio.fail_after(LIMIT):
            while len(found := [event for name, event in self.events if name == topic]) < count:
                self._event_came = trio.Event()
                await self._event_came.wait()
        return found

    async def forward(self, request: Any, context: object) -> Empty:
        """Take an event, as containerd's service does."""
        event = request.envelope.event
        kind = getattr(events_pb2, event.type_url.removeprefix("containerd.events."))
        self.events.append((request.envelope.topic, kind.FromString(event.value)))
        self._event_came.set()
        return Empty()

    def forget_peak(self) -> int:
        """Return the resident memory in bytes, and measure the peak from now on."""
        (Path("/proc") / str(self.process.pid) / "clear_refs").write_text("5")  # proc(5): resets VmHWM
        return self._memory("VmRSS")

    def peak(self) -> int:
        """Return the largest resident memory since `forget_peak`, in bytes."""
        return self._memory("VmHWM")

    def _memory(self, name: str) -> int:
        status = (Path("/proc") / str(self.process.pid) / "status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0]) << 10

    def holds(self) -> list[str]:
        """List what there is because of pods: processes, mounts, files, descriptors."""
        pid = self.process.pid
        found = [f"process {p}" for p in processes_of(self.directory) if p.pid != pid]
        mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        found += [f"mount {line.split()[4]}" for line in mounts if str(self.directory) in line]
        found += [f"file {path}" for path in self.run_dir.glob("*/*")]
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.append(f"descriptor {str(descriptor.readlink()).partition(':[')[0]}")
        return sorted(found)

    def left_over(self, before: list[str]) -> list[str]:
        """Return what it holds beyond `before`, after giving it time to go away."""
        deadline = time.monotonic() + SETTLE
        while True:
            left = self.holds()
            for thing in before:
                if thing in left:
                    left.remove(thing)
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(INTERVAL)  # nothing tells when the kernel is done

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[ShimProcess]:
        """Be its client and its containerd for the length of the block."""
        events = Server()
        events.add_service(ttrpc_events_pb2.DESCRIPTOR.services_by_name["Events"], self)
        self.events.clear()
        (self.directory / "events").unlink(missing_ok=True)
        async with trio.open_nursery() as nursery:
            sock = trio.socket.from_stdlib_socket(listen(self.directory / "events"))
            await nursery.start(events.serve_listeners, [trio.SocketListener(sock)])
            self.client = Client(await trio.open_unix_socket(str(self.directory / "shim")))
            nursery.start_soon(self.client.run)
            yield self
            nursery.cancel_scope.cancel()


@contextmanager
def serving(directory: Path, config: str, *, rate: float) -> Iterator[ShimProcess]:
    """Run a serving shim in `directory`, with this configuration; its clock is `rate` times as fast."""
    (directory / "configuration.toml").write_text(config)
    environ = {MARK: str(directory), "KATA_CONF_FILE": str(directory / "configuration.toml")}
    (directory / "shim").unlink(missing_ok=True)
    with listen(directory / "shim") as listener, (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.harness.shim_process",
                str(directory),
                str(listener.fileno()),
                str(rate),
            ],
            env=os.environ | environ | {"PYTHONPATH": str(ROOT)},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
        )
    try:
        yield ShimProcess(directory, process)
    finally:
        process.kill()
        process.wait()
        for left in processes_of(directory):
            kill(left)


def main() -> None:
    """Serve, as `shim.serve.main` does."""
    directory, descriptor, rate = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    kernel.own_mount_namespace()
    kernel.become_subreaper()
    logs.install(2, {"id": "c1"}, debug=False)
    words = Args()
    words.id, words.namespace = "c1", "ns"
    path, events = str(directory / "shim"), str(directory / "events")
    clock = trio.testing.MockClock(rate=rate)
    trio.run(serve.serve, words, path, str(directory), descriptor, events, b"", clock=clock)


if __name__ == "__main__":
    main()
