"""A process's streams between the guest (memory) and the client (real fifos, files and programs)."""

from __future__ import annotations

import os
from pathlib import Path

import trio
from trio.testing import MemorySendStream, memory_stream_one_way_pair

from shim.stdio import ProcessIO
from shim.stdio_uri import plan
from shim.tasks import Stdio


class Guest:
    """A process as stdio sees it: what it writes comes out of `stdout`, what it gets is in `received`."""

    def __init__(self) -> None:
        self.out, self.stdout = memory_stream_one_way_pair()
        self.err, self.stderr = memory_stream_one_way_pair()
        self.stdin: MemorySendStream | None
        self.stdin, self.received = memory_stream_one_way_pair()

    async def close_stdin(self) -> None:
        assert self.stdin is not None
        await self.stdin.aclose()

    async def write(self, data: bytes) -> None:
        await self.out.send_all(data)

    async def end(self) -> None:
        await self.out.aclose()
        await self.err.aclose()


class Setup:
    """Fifos in a directory, and a ProcessIO over them."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        self.guest = Guest()
        self.nursery = nursery
        self.io: ProcessIO

    def fifo(self, name: str) -> str:
        path = self.directory / name
        os.mkfifo(path)
        return str(path)

    def make(self, **names: object) -> ProcessIO:
        self.io = ProcessIO(plan(Stdio(**names)), process_id="c1", namespace="ns")  # type: ignore[arg-type]
        return self.io

    async def run(self, **names: object) -> ProcessIO:
        self.make(**names)
        await self.io.open()
        self.nursery.start_soon(self.io.run, self.guest)
        return self.io


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}
