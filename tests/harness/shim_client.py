"""A shim's Task service, called directly: what containerd's client would not send, or would answer itself.

The shim is that of a real task of a real containerd. Beside this task it is given others, which containerd
does not know of, so that a test has them in the states that it needs: both runc's shim and ours serve any
number of containers. All of them have one root file system.
"""

import json
import os
import secrets
import select
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from google.protobuf.message import Message

from protos.containerd import task_v2_pb2
from protos.containerd.types_pb2 import Mount
from tests.harness.containerd import TIMEOUT, Containerd, HarnessError
from tests.harness.image import IMAGE, unpack_image
from ttrpc import methods
from ttrpc.client import Client
from ttrpc.status import Code, StatusError

METHODS = methods.service(task_v2_pb2.DESCRIPTOR.services_by_name["Task"])
PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"
RESOURCES_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
# The annotations by which a container joins a sandbox; runc's shim has no use for them.
POD = {"io.kubernetes.cri.container-type": "container"}
SANDBOX_ID = "io.kubernetes.cri.sandbox-id"
# Says when it can be killed: without a handler the kernel keeps SIGTERM from a first process.
WORKLOAD = ("sh", "-c", "trap 'exit 143' TERM; echo ready; while :; do sleep 1000 & wait $!; done")


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call ended: `code` is None if it has not."""

    code: Code | None
    message: Message | None = None
    text: str = ""


@dataclass(slots=True)
class Shim:
    """The shim of containerd's task `id`. `close` deletes whatever it was given."""

    containerd: Containerd
    runtime: str
    id: str = field(init=False)
    directory: Path = field(init=False)
    outputs: dict[str, int] = field(default_factory=dict)  # read ends of stdout, by container

    def __post_init__(self) -> None:
        self.id = self.containerd.new_id("shim")
        self.directory = self.containerd.directory / self.id
        unpack_image(self.directory / "root")
        fixed = ("run", "--detach", "--runtime", self.runtime, "--fifo-dir", f"{self.directory}/fifo")
        self.containerd.ctr(*fixed, IMAGE, self.id, "sleep", "1000")

    @property
    def bundle(self) -> Path:
        state = self.containerd.directory / "state" / "io.containerd.runtime.v2.task"
        return state / self.containerd.namespace / self.id

    def close(self) -> None:
        """End all tasks. Safe to call in any state, and twice."""
        for container in list(self.outputs):
            if self.call("Kill", id=container, signal=9, all=True).code == Code.OK:
                self.call("Wait", id=container)
            self.call("Delete", id=container)
            os.close(self.outputs.pop(container))
        self.containerd.remove(self.id)

    def call(self, name: str, limit: float = TIMEOUT, **fields: Any) -> Answer:
        """Make one call on a connection of its own; in an Answer without a code `limit` has passed."""
        method = METHODS[name]
        return trio.run(self._call, method, method.request_class(**fields), limit)

    async def _call(self, method: methods.Method[Message, Message], request: Message, limit: float) -> Answer:
        address = (self.bundle / "address").read_text().removeprefix("unix://")
        with trio.move_on_after(limit):
            async with trio.open_nursery() as nursery:
                client = Client(await trio.open_unix_socket(address))
                nursery.start_soon(client.run)
                try:
                    return Answer(Code.OK, await client.call(method, request))
                except StatusError as exc:
                    return Answer(Code(exc.status.code), text=exc.status.message)
                finally:
                    nursery.cancel_scope.cancel()
        return Answer(None)

    def must(self, name: str, **fields: Any) -> Message:
        """Make a call that succeeds, and return its answer."""
        answer = self.call(name, **fields)
        if answer.code != Code.OK or answer.message is None:
            raise HarnessError(f"{name} {fields} on {self.runtime}: {answer}")
        return answer.message

    def create(self, *command: str) -> str:
        """Create a container, and return its id. Its output can be read by `read`."""
        container = f"{self.id}-{secrets.token_hex(3)}"
        bundle = self.directory / container
        (bundle / "rootfs").mkdir(parents=True)
        spec = json.loads((self.bundle / "config.json").read_text())
        spec["process"]["args"] = list(command or WORKLOAD)
        spec["annotations"] = {**POD, SANDBOX_ID: self.id}
        spec["linux"]["cgroupsPath"] = f"/{self.containerd.namespace}/{container}"
        (bundle / "config.json").write_text(json.dumps(spec))
        stdout = bundle / "stdout"
        os.mkfifo(stdout)
        self.outputs[container] = os.open(stdout, os.O_RDONLY | os.O_NONBLOCK)
        root = Mount(type="bind", source=f"{self.directory}/root", options=["rbind", "rw"])
        streams = {"stdout": str(stdout), "stderr": str(stdout)}  # runc's shim takes both or none
        self.must("Create", id=container, bundle=str(bundle), rootfs=[root], **streams)
        return container

    def start(self, container: str) -> None:
        """Start a container with the default command, and wait until it handles signals."""
        self.must("Start", id=container)
        self.read(container, b"ready\n")

    def read(self, container: str, expected: bytes) -> None:
        """Read the output of a container up to `expected`."""
        found = b""
        while not found.endswith(expected):
            if not select.select([self.outputs[container]], [], [], TIMEOUT)[0]:
                raise HarnessError(f"{container} wrote {found!r}, but not {expected!r}")
            piece = os.read(self.outputs[container], 4096)
            if not piece:
                raise HarnessError(f"the output of {container} ended with {found!r}, not {expected!r}")
            found += piece

    def process(self, *command: str) -> Mapping[str, Any]:
        """Return the fields of Exec for a process with this command."""
        value = json.dumps({"args": list(command), "cwd": "/", "env": ["PATH=/bin"]}).encode()
        return {"spec": {"type_url": PROCESS_TYPE, "value": value}}

    def exec(self, container: str, command: Sequence[str] = ("sleep", "1000")) -> str:
        """Register a process, and return its exec id."""
        exec_id = f"e-{secrets.token_hex(3)}"
        self.must("Exec", id=container, exec_id=exec_id, **self.process(*command))
        return exec_id
