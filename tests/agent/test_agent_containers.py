"""Containers and processes, with the real agent, crun and kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from agent_harness import receive_all

if TYPE_CHECKING:
    from agent_harness import Guest

pytestmark = pytest.mark.integration


async def test_a_container_runs_and_its_output_and_status_come_back(guest: Guest) -> None:
    container = await guest.start("/bin/sh", "-c", "echo hello; echo oops >&2; exit 3")
    assert await guest.read_all(container) == b"hello\n"
    assert await guest.read_all(container, stream="ReadStderr") == b"oops\n"
    assert (await guest.wait(container)).status == 3
    await guest.remove(container)


async def test_output_comes_over_a_stream_of_its_own(guest: Guest) -> None:
    ports = guest.ports()
    container = await guest.start("/bin/cat", ports=ports)
    stdin, stdout, stderr = [await guest.dial(port) for port in ports]
    await stdin.send_all(b"to and fro")
    await stdin.send_eof()
    assert await receive_all(stdout) == b"to and fro"
    assert await receive_all(stderr) == b""
    answer = await guest.wait(container)
    assert (answer.status, answer.stdout_bytes, answer.stderr_bytes) == (0, 10, 0)
    await guest.remove(container)
