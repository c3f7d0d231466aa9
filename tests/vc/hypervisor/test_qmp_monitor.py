"""The monitor's connection, to a real QEMU that has no machine: it starts in a moment and runs no guest."""

import gc
import logging
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from vc.errors import HypervisorError, Timeout
from vc.hypervisor.qemu import qmp
from vc.hypervisor.qemu.monitor import monitoring
from vc.hypervisor.qemu.qmp import Command, Event, Resumed, Shutdown, Stopped
from vc.unixsock import connect_nowait, listen

QEMU = shutil.which("qemu-system-x86_64")
LIMIT = 30.0  # seconds: only against a hang
TRIES = 20  # of what does not happen each time
# QEMU: docs/interop/qmp-spec
GREETING = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": []}}\r\n'

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed"),
]


@contextmanager
def qemu(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    assert QEMU is not None
    with listen(path) as listener:
        argv = [QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-S"]
        argv += ["-chardev", f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"]
        process = subprocess.Popen(
            [*argv, "-mon", "chardev=qmp,mode=control"], pass_fds=[listener.fileno()], stderr=subprocess.PIPE
        )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    path = tmp_path / "qmp.sock"
    with qemu(path) as process:
        yield path, process


async def test_commands_are_answered_refused_and_followed_by_events(
    vmm: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    events: list[Event] = []
    with trio.fail_after(LIMIT):
        async with monitoring(connect_nowait(vmm[0]), events.append) as monitor:
            status = await monitor.execute(qmp.query_status())
            assert isinstance(status, dict)
            assert (status["running"], status["status"]) == (False, "prelaunch")
            with pytest.raises(HypervisorError, match="QMP command no-such: The command no-such has not"):
                await monitor.execute(Command("no-such"))
            await monitor.execute(qmp.cont())
            await monitor.execute(qmp.stop())
            await monitor.execute(Command("quit"))
            await monitor.ended.wait()
    assert events == [Resumed(), Stopped(), Shutdown(by_guest=False, reason="host-qmp-quit")]


async def test_a_descriptor_goes_with_its_command(vmm: tuple[Path, subprocess.Popen[bytes]]) -> None:
    reader, writer = os.pipe()
    try:
        with trio.fail_after(LIMIT):
            async with monitoring(connect_nowait(vmm[0]), lambda _: None) as monitor:
                with pytest.raises(HypervisorError, match="No file descriptor supplied"):
                    await monitor.execute(qmp.getfd("one"))
                await monitor.execute(qmp.getfd("one"), descriptor=writer)
                await monitor.execute(Command("closefd", {"fdname": "one"}))
    finally:
        os.close(reader)
        os.close(writer)


async def test_many_commands_at_once_each_get_their_own_answer(
    vmm: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    found: dict[str, object] = {}

    async with monitoring(connect_nowait(vmm[0]), lambda _: None) as monitor:

        async def ask(name: str) -> None:
            found[name] = await monitor.execute(Command(name))

        names = ["query-status", "query-version", "query-name", "query-uuid", "query-kvm"]
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                for name in names:
                    nursery.start_soon(ask, name)
    shapes = {name: sorted(found[name]) for name in names if isinstance(found[name], dict)}
    assert shapes["query-version"] == ["package", "qemu"]
    assert shapes["query-uuid"] == ["UUID"]
    assert shapes["query-kvm"] == ["enabled", "present"]


async def test_when_qemu_is_killed_what_waits_and_what_comes_later_fails(
    vmm: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    path, process = vmm
    with trio.fail_after(LIMIT):
        async with monitoring(connect_nowait(path), lambda _: None) as monitor:
            await monitor.execute(qmp.query_status())
            process.kill()
            await monitor.ended.wait()
            with pytest.raises(HypervisorError, match="QMP command stop"):
                await monitor.execute(qmp.stop())
            monitor.fail("QEMU was killed by SIGKILL")
            with pytest.raises(HypervisorError, match="QMP command stop: QEMU was killed by SIGKILL"):
                await monitor.execute(qmp.stop())


async def test_the_next_owner_of_a_vmm_gets_a_monitor_of_his_own(
    vmm: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    for _ in range(2):
        with trio.fail_after(LIMIT):
            async with monitoring(connect_nowait(vmm[0]), lambda _: None) as monitor:
                await monitor.execute(qmp.query_status())


async def test_a_command_that_a_hung_qemu_does_not_answer_runs_out_of_time() -> None:
    ours, theirs = socket.socketpair()
    with theirs, trio.fail_after(LIMIT):
        async with monitoring(ours, lambda _: None) as monitor:
            with pytest.raises(Timeout, match=r"QMP command stop: no answer from QEMU within 0\.01 s"):
                await monitor.execute(qmp.stop(), timeout=0.01)


async def test_what_speaks_no_qmp_is_told_of() -> None:
    ours, theirs = socket.socketpair()
    with theirs, trio.fail_after(LIMIT):
        async with monitoring(ours, lambda _: None) as monitor:
            theirs.sendall(b"HTTP/1.1 400 Bad Request\r\n")
            with pytest.raises(HypervisorError, match="QMP command stop: QEMU did not open its monitor"):
                await monitor.execute(qmp.stop())


# The library may leave its transport to the collector of garbage, which closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_connection_that_ends_while_we_hang_up_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """A VMM that was killed in a start left a traceback in the log: "exception was never retrieved"."""
    for _ in range(TRIES):
        ours, theirs = socket.socketpair()
        with theirs, trio.fail_after(LIMIT):
            theirs.sendall(GREETING)
            async with monitoring(ours, lambda _: None):
                await trio.to_thread.run_sync(theirs.recv, 1000)  # it is about to be opened
                theirs.sendall(b'{"return": {}}\r\n')
                theirs.close()
        gc.collect()  # what is forgotten says so then
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
