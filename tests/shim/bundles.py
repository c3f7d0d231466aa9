"""A bundle as containerd makes it, and the shim's program run in it."""

from __future__ import annotations

import hashlib
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import trio

from protos.containerd import bootstrap_pb2, task_v2_pb2
from ttrpc import methods
from ttrpc.client import Client

ROOT = Path(__file__).resolve().parents[2]
TASK = methods.service(task_v2_pb2.DESCRIPTOR.services_by_name["Task"])


@dataclass
class Bundle:
    """A bundle directory with its log, as containerd makes it, and a directory for sockets."""

    path: Path
    sockets: Path
    log: int

    def shim(self, action: str, *flags: str, stdin: bytes = b"", task_id: str = "c1") -> bytes:
        done = self.run(action, *flags, stdin=stdin, task_id=task_id)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def run(
        self, action: str, *flags: str, stdin: bytes = b"", task_id: str = "c1"
    ) -> subprocess.CompletedProcess[bytes]:
        argv = [sys.executable, "-W", "error", "-m", "shim", "-namespace", "ns", "-address", "/a.sock"]
        return subprocess.run(
            [*argv, "-publish-binary", "/bin/true", "-id", task_id, *flags, action],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TTRPC_ADDRESS": ""},
            timeout=60,
        )

    def bootstrap(self, task_id: str = "c1") -> bytes:
        """What containerd 2.3 says; here for the place of the socket."""
        return bootstrap_pb2.BootstrapParams(
            instance_id=task_id, namespace="ns", socket_dir=str(self.sockets)
        ).SerializeToString()

    def socket(self, task_id: str = "c1") -> Path:
        return self.sockets / hashlib.sha256(f"/a.sock/ns/{task_id}".encode()).hexdigest()

    def pid(self) -> int:
        return int((self.path / "shim.pid").read_text())

    def read_log(self) -> str:
        try:
            return os.read(self.log, 65536).decode()
        except BlockingIOError:
            return ""


def end(pid: int, number: signal.Signals | None = None) -> None:
    """Wait for the end of a process that is not our child."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if number is not None:
            signal.pidfd_send_signal(handle, number)
        assert select.select([handle], [], [], 30)[0], f"process {pid} does not end"
    finally:
        os.close(handle)


async def call(path: Path, method: str, task_id: str = "c1") -> object:
    async with trio.open_nursery() as nursery:
        client = Client(await trio.open_unix_socket(str(path)))
        nursery.start_soon(client.run)
        entry = TASK[method]
        answer = await client.call(entry, entry.request_class(id=task_id), timeout=30)
        nursery.cancel_scope.cancel()
        return answer
