"""Standard streams of processes, by calls and by streams of their own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from tests.harness.agent import Refused, receive_all
from ttrpc.status import Code, StatusError

if TYPE_CHECKING:
    from tests.harness.agent import Guest

pytestmark = pytest.mark.integration

BURST = 8 << 20  # bytes; many times what any pipe holds
SIZE = {"Height": 20, "Width": 50}
TERMINAL = {"Terminal": True}


async def collect(result: dict[str, bytes], key: str, stream: trio.SocketStream) -> None:
    result[key] = await receive_all(stream)


async def test_output_and_input_go_over_streams(guest: Guest) -> None:
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


async def test_nothing_of_a_burst_before_the_exit_is_lost_on_a_stream(guest: Guest) -> None:
    ports = guest.ports()
    container = await guest.create("/bin/sh", "-c", "head -c 8388608 /dev/zero", ports=ports)
    stdout = await guest.dial(ports[1])
    await guest.call("StartContainer", container_id=container)
    assert len(await receive_all(stdout)) == BURST
    answer = await guest.wait(container)
    assert (answer.status, answer.stdout_bytes) == (0, BURST)
    await guest.remove(container)


async def test_nothing_is_lost_when_the_host_connects_after_the_exit(guest: Guest) -> None:
    ports = guest.ports()
    container = await guest.start("/bin/sh", "-c", "echo late; echo too late >&2", ports=ports)
    answer = await guest.wait(container)
    assert (answer.stdout_bytes, answer.stderr_bytes) == (5, 9)
    assert await receive_all(await guest.dial(ports[1])) == b"late\n"
    assert await receive_all(await guest.dial(ports[2])) == b"too late\n"
    await guest.remove(container)


async def test_nothing_of_a_burst_is_lost_by_calls(guest: Guest) -> None:
    container = await guest.start("/bin/sh", "-c", "head -c 8388608 /dev/zero")
    assert len(await guest.read_all(container)) == BURST
    answer = await guest.wait(container)
    assert answer.status == 0
    assert not answer.HasField("stdout_bytes")
    await guest.remove(container)


async def test_a_host_that_does_not_read_stops_the_writer(guest: Guest) -> None:
    """Backpressure: the process ends only when its output is read, so nothing piles up in the agent."""
    ports = guest.ports()
    container = await guest.start("/bin/sh", "-c", "head -c 8388608 /dev/zero", ports=ports)
    stdout = await guest.dial(ports[1])
    with trio.move_on_after(0.3) as scope:
        await guest.call_patiently("WaitProcess", container_id=container)
    assert scope.cancelled_caught
    assert len(await receive_all(stdout)) == BURST
    assert (await guest.wait(container)).status == 0
    await guest.remove(container)


async def test_both_directions_flow_at_once(guest: Guest) -> None:
    ports = guest.ports()
    container = await guest.start("/bin/cat", ports=ports)
    stdin, stdout = await guest.dial(ports[0]), await guest.dial(ports[1])
    result: dict[str, bytes] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect, result, "out", stdout)
        for _ in range(32):
            await stdin.send_all(bytes(BURST // 32))
        await stdin.send_eof()
    assert len(result["out"]) == BURST
    assert (await guest.wait(container)).stdout_bytes == BURST
    await guest.remove(container)


async def test_a_background_child_does_not_hold_the_end_of_calls(guest: Guest) -> None:
    container = await guest.start("/bin/sleep", "1000")
    process = await guest.exec(container, "/bin/sh", "-c", "echo before; sleep 1000 & exit 5")
    assert await guest.read_all(container, process) == b"before\n"
    assert (await guest.wait(container, process)).status == 5
    await guest.remove(container)


async def test_what_a_background_child_writes_later_still_flows_to_a_stream(guest: Guest) -> None:
    ports = guest.ports()
    container = await guest.start("/bin/sleep", "1000")
    script = "echo before; (read line; echo after) <&3 & exit 5"
    process = await guest.exec(container, "/bin/sh", "-c", f"exec 3<&0; {script}", ports=ports)
    stdin, stdout = await guest.dial(ports[0]), await guest.dial(ports[1])
    answer = await guest.wait(container, process)
    assert (answer.status, answer.stdout_bytes) == (5, 7)
    assert await stdout.receive_some() == b"before\n"
    del stdin
    await guest.remove(container)
    assert await stdout.receive_some() == b""


async def test_an_end_of_input_arrives_in_each_of_its_ways(guest: Guest) -> None:
    container = await guest.start("/bin/sleep", "1000")
    by_close = await guest.exec(container, "/bin/cat")
    fields = {"container_id": container, "exec_id": by_close}
    assert (await guest.call("WriteStdin", **fields, data=b"abc")).len == 3
    await guest.call("CloseStdin", **fields)
    assert await guest.read_all(container, by_close) == b"abc"
    assert (await guest.wait(container, by_close)).status == 0
    by_empty_write = await guest.exec(container, "/bin/cat")
    await guest.call("WriteStdin", container_id=container, exec_id=by_empty_write)
    assert await guest.read_all(container, by_empty_write) == b""
    assert (await guest.wait(container, by_empty_write)).status == 0
    await guest.remove(container)


async def test_input_that_nobody_reads_does_not_hold_anything(guest: Guest) -> None:
    ports = guest.ports()
    container = await guest.start("/bin/sh", "-c", "read line; exit 4", ports=ports)
    stdin = await guest.dial(ports[0])
    await stdin.send_all(b"a line\n")
    with pytest.raises(trio.BrokenResourceError), trio.fail_after(10):
        while True:
            await stdin.send_all(bytes(1 << 20))
    assert (await guest.wait(container)).status == 4
    await guest.remove(container)


async def test_writing_to_a_process_that_has_ended_is_an_error(guest: Guest) -> None:
    container = await guest.start("/bin/true")
    await guest.wait(container)
    with pytest.raises(StatusError) as caught:
        await guest.call("WriteStdin", container_id=container, data=b"x")
    assert caught.value.code == Code.FAILED_PRECONDITION
    await guest.remove(container)


async def test_a_host_that_hangs_up_does_not_end_the_process(guest: Guest) -> None:
    ports = guest.ports()
    container = await guest.create(
        "/bin/sh", "-c", "head -c 8388608 /dev/zero && echo done >&2; exit 6", ports=ports
    )
    stdout, stderr = await guest.dial(ports[1]), await guest.dial(ports[2])
    await guest.call("StartContainer", container_id=container)
    await stdout.receive_some(1)
    await stdout.aclose()
    assert await receive_all(stderr) == b"done\n"
    assert (await guest.wait(container)).status == 6
    await guest.remove(container)


async def test_a_terminal_has_a_size_and_one_output(guest: Guest) -> None:
    container = await guest.start("/bin/sleep", "1000")
    # crun tells the terminal its size when the process may run already; whoever asked before gets SIGWINCH.
    sized = """until [ "$(stty size 2>/dev/null)" = "20 50" ]; do :; done"""
    script = f"stty -echo; {sized}; stty size; echo ready; read line; stty size; echo err >&2"
    process = await guest.exec(container, "/bin/sh", "-c", script, **TERMINAL, ConsoleSize=SIZE)
    fields = {"container_id": container, "exec_id": process}
    output = b""
    while b"ready" not in output:
        output += (await guest.call("ReadStdout", **fields, len=4096)).data
    await guest.call("TtyWinResize", **fields, row=33, column=101)
    await guest.call("WriteStdin", **fields, data=b"\n")
    output += await guest.read_all(container, process)
    assert output.split() == [b"20", b"50", b"ready", b"33", b"101", b"err"]
    assert (await guest.call("ReadStderr", **fields, len=10)).data == b""
    assert (await guest.wait(container, process)).status == 0
    await guest.remove(container)


async def test_a_terminal_goes_over_streams_too(guest: Guest) -> None:
    stdin_port, stdout_port, _ = guest.ports()
    container = await guest.start(
        "/bin/sh", "-c", "read line; head -c 300000 /dev/zero", ports=(stdin_port, stdout_port, 0), **TERMINAL
    )
    stdin, stdout = await guest.dial(stdin_port), await guest.dial(stdout_port)
    await stdin.send_all(b"\n")
    output = await receive_all(stdout)
    assert output.count(b"\0") == 300000
    answer = await guest.wait(container)
    assert (answer.status, answer.stdout_bytes) == (0, len(output))
    await guest.remove(container)


async def test_resizing_what_is_no_terminal_is_refused(guest: Guest) -> None:
    container = await guest.start("/bin/sleep", "1000")
    with pytest.raises(StatusError, match="no tty") as caught:
        await guest.call("TtyWinResize", container_id=container, row=1, column=1)
    assert caught.value.code == Code.UNAVAILABLE
    await guest.remove(container)


async def test_a_process_of_another_user_can_open_its_output_again(guest: Guest) -> None:
    """Symptom: permission denied on /dev/stdout. Cause: pipes that belong to root."""
    user = {"User": {"UID": 1000, "GID": 1000, "AdditionalGids": [1234]}}
    container = await guest.start("/bin/sh", "-c", "echo again >/proc/self/fd/1; id", **user)
    output = await guest.read_all(container)
    assert output.startswith(b"again\n")
    assert b"uid=1000 gid=1000 groups=1000,1234" in output or b"groups=1234" in output
    await guest.remove(container)


async def test_a_port_takes_one_connection_and_is_gone(guest: Guest) -> None:
    ports = guest.ports()
    container = await guest.start("/bin/sleep", "1000", ports=ports)
    await guest.dial(ports[1])
    with pytest.raises(Refused, match="ERR nobody waits"):
        await guest.dial(ports[1])
    await guest.remove(container)
    with pytest.raises(Refused, match="ERR nobody waits"):
        await guest.dial(ports[2])


async def test_many_readers_wait_at_once(guest: Guest) -> None:
    container = await guest.start("/bin/sh", "-c", "read line; exit 9")
    answers: list[int] = []

    async def wait() -> None:
        answers.append((await guest.wait(container)).status)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(wait)
        nursery.start_soon(partial(guest.call, "CloseStdin", container_id=container))
    assert answers == [9] * 8 or answers == [1] * 8
    await guest.remove(container)
