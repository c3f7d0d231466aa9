"""What the tests of the shim share: a served pod, a bundle for the program, and a process's streams."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from protos.containerd import ttrpc_events_pb2
from shim import serve
from shim.events import Publisher
from tests.shim.bundles import Bundle, end
from tests.shim.pods import Shim, listener
from tests.shim.streams import Setup, descriptors
from ttrpc.client import Client
from ttrpc.server import Server


@pytest.fixture
async def shim(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Shim]:
    """A served pod. A traceback in the log is a bug, whatever was answered."""
    path = tmp_path / "s"
    shim = Shim(tmp_path, path, None)  # type: ignore[arg-type]
    events = Server()
    events.add_service(ttrpc_events_pb2.DESCRIPTOR.services_by_name["Events"], shim)
    await nursery.start(events.serve_listeners, [listener(tmp_path / "events")])
    config = SimpleNamespace(runtime=SimpleNamespace(run_dir=tmp_path / "run"), source=tmp_path / "c.toml")
    serving = listener(path)

    async def run() -> None:
        await serve.run(
            serving,
            namespace="ns",
            publisher=Publisher(str(tmp_path / "events"), "ns"),
            open_sandbox=shim.open_sandbox,  # type: ignore[arg-type]
            load_config=lambda explicit: config,  # type: ignore[arg-type, return-value]
            leaving=path.unlink,
        )
        shim.ended.set()

    nursery.start_soon(run)
    shim.client = Client(await trio.open_unix_socket(str(path)))
    nursery.start_soon(shim.client.run)
    yield shim
    nursery.cancel_scope.cancel()
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert not tracebacks, "\n".join(logging.Formatter().format(record) for record in tracebacks)


@pytest.fixture
def made() -> Iterator[Bundle]:
    with tempfile.TemporaryDirectory(prefix="shim-") as directory:  # tmp_path is too long for a socket
        path, sockets = Path(directory, "b"), Path(directory, "s")
        path.mkdir()
        sockets.mkdir()
        (path / "config.json").write_text(json.dumps({"process": {"args": ["true"]}}))
        os.mkfifo(path / "log")
        log = os.open(path / "log", os.O_RDWR | os.O_NONBLOCK)
        made = Bundle(path, sockets, log)
        try:
            yield made
        finally:
            if (path / "shim.pid").exists():
                end(made.pid(), signal.SIGKILL)
            os.close(log)


@pytest.fixture
async def setup(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Setup]:
    before = descriptors()
    setup = Setup(tmp_path, nursery)
    yield setup
    await setup.io.close()
    await setup.io.end_logger()
    assert descriptors() <= before, "descriptors are left open"
