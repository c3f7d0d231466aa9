"""Containers and processes, with the real agent, crun and kernel."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from protos.kata import agent_pb2, oci_pb2
from ttrpc.status import Code, StatusError

if TYPE_CHECKING:
    from tests.harness.agent import Guest

pytestmark = pytest.mark.integration


async def fails(code: Code, match: str, guest: Guest, name: str, **fields: object) -> None:
    """Check that a call is answered with this code and text."""
    with pytest.raises(StatusError, match=match) as caught:
        await guest.call(name, **fields)
    assert caught.value.code == code


async def test_a_container_runs_and_its_output_and_status_come_back(guest: Guest) -> None:
    container = await guest.start("/bin/sh", "-c", "echo hello; echo oops >&2; exit 3")
    assert await guest.read_all(container) == b"hello\n"
    assert await guest.read_all(container, stream="ReadStderr") == b"oops\n"
    assert (await guest.wait(container)).status == 3
    await guest.remove(container)


async def test_every_kind_of_exit_status_is_told(guest: Guest) -> None:
    container = await guest.start("/bin/sleep", "1000")
    for status in (0, 1, 2, 100, 127, 128, 200, 255):
        process = await guest.exec(container, "/bin/sh", "-c", f"exit {status}")
        assert (await guest.wait(container, process)).status == status
    for number in (signal.SIGHUP, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM):
        process = await guest.exec(container, "/bin/sh", "-c", f"kill -{number.value} $$; sleep 1000")
        assert (await guest.wait(container, process)).status == 128 + number
    await guest.remove(container)


async def test_waiting_again_gives_the_same_answer_until_the_container_is_removed(guest: Guest) -> None:
    container = await guest.start("/bin/sh", "-c", "exit 8")
    assert (await guest.wait(container)).status == 8
    assert (await guest.wait(container, container)).status == 8
    await guest.remove(container)
    await fails(Code.NOT_FOUND, "InvalidContainerId", guest, "WaitProcess", container_id=container)


async def test_an_exec_id_is_free_again_once_its_exit_was_told(guest: Guest) -> None:
    container = await guest.start("/bin/sleep", "1000")
    fields = {"container_id": container, "exec_id": "twice"}
    await guest.call("ExecProcess", **fields, process=guest.process("/bin/sh", "-c", "read line; exit 1"))
    again = guest.process("/bin/sh", "-c", "exit 2")
    await fails(
        Code.ALREADY_EXISTS, "exec_id 'twice' already exists", guest, "ExecProcess", **fields, process=again
    )
    await guest.call("CloseStdin", **fields)
    assert (await guest.wait(container, "twice")).status == 1
    await guest.call("ExecProcess", **fields, process=again)
    assert (await guest.wait(container, "twice")).status == 2
    await guest.remove(container)


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("missing", r"executable file `missing` not found in \$PATH"),
        ("/bin/missing", "No such file or directory"),
        ("/bin/notexec", "[Pp]ermission denied|not found"),
    ],
)
async def test_a_program_that_cannot_run_fails_at_once_and_leaves_nothing(
    guest: Guest, program: str, text: str
) -> None:
    spec = guest.spec(program)
    await fails(Code.INTERNAL, text, guest, "CreateContainer", container_id="broken", OCI=spec)
    assert not (guest.agent.root / "bundles/broken").exists()
    await fails(Code.NOT_FOUND, "InvalidContainerId", guest, "StartContainer", container_id="broken")
    container = await guest.start("/bin/sleep", "1000")
    fields = {"container_id": container, "exec_id": "broken"}
    await fails(Code.INTERNAL, text, guest, "ExecProcess", **fields, process=guest.process(program))
    await fails(Code.NOT_FOUND, "InvalidExecId", guest, "WaitProcess", **fields)
    await guest.remove(container)


async def test_names_are_checked(guest: Guest) -> None:
    for name in ("", "a", "../up", "with space", ".hidden"):
        await fails(
            Code.INVALID_ARGUMENT,
            "invalid container id",
            guest,
            "CreateContainer",
            container_id=name,
            OCI=guest.spec("/bin/true"),
        )
    container = await guest.create("/bin/true")
    await fails(
        Code.ALREADY_EXISTS,
        "already exists",
        guest,
        "CreateContainer",
        container_id=container,
        OCI=guest.spec("/bin/true"),
    )
    await guest.remove(container)
    for name in ("StartContainer", "RemoveContainer", "PauseContainer", "StatsContainer", "ReadStdout"):
        await fails(Code.NOT_FOUND, "InvalidContainerId", guest, name, container_id="nobody")


async def test_a_container_that_was_never_started_can_be_killed_and_removed(guest: Guest) -> None:
    container = await guest.create("/bin/true")
    await guest.call("SignalProcess", container_id=container, signal=9)
    assert (await guest.wait(container)).status == 137
    await fails(Code.FAILED_PRECONDITION, "it is stopped", guest, "StartContainer", container_id=container)
    await guest.remove(container)


async def test_sigkill_without_an_exec_id_reaches_all_processes(guest: Guest) -> None:
    container = await guest.start("/bin/sleep", "1000")
    process = await guest.exec(container, "/bin/sleep", "1000")
    await guest.call("SignalProcess", container_id=container, signal=9)
    assert (await guest.wait(container)).status == 137
    assert (await guest.wait(container, process)).status == 137
    await guest.call("SignalProcess", container_id=container, signal=9)  # as often as one likes
    await guest.remove(container)


async def test_sigterm_ends_an_init_that_does_not_care(guest: Guest) -> None:
    container = await guest.start("/bin/sleep", "1000")
    await guest.call("SignalProcess", container_id=container, exec_id=container, signal=15)
    assert (await guest.wait(container)).status == 137
    await guest.remove(container)


async def test_sigterm_is_handed_to_an_init_that_catches_it_and_to_no_other(guest: Guest) -> None:
    script = "trap 'echo got it; exit 21' TERM; echo ready; while :; do sleep 0.05; done"
    container = await guest.start("/bin/sh", "-c", script)
    other = await guest.exec(container, "/bin/sleep", "1000")
    assert (await guest.call("ReadStdout", container_id=container, len=100)).data == b"ready\n"
    await guest.call("SignalProcess", container_id=container, signal=15)
    assert await guest.read_all(container) == b"got it\n"
    assert (await guest.wait(container)).status == 21
    assert (await guest.wait(container, other)).status == 137  # with its namespace
    await guest.remove(container)


async def test_a_container_can_be_paused_and_killed_in_its_sleep(guest: Guest) -> None:
    container = await guest.start("/bin/sh", "-c", "while :; do sleep 0.05; done")
    await guest.call("PauseContainer", container_id=container)
    await fails(Code.FAILED_PRECONDITION, "it is paused", guest, "PauseContainer", container_id=container)
    await guest.call("ResumeContainer", container_id=container)
    await guest.call("PauseContainer", container_id=container)
    await guest.call("SignalProcess", container_id=container, signal=9)
    assert (await guest.wait(container)).status == 137
    await guest.remove(container)


async def test_limits_and_statistics(guest: Guest) -> None:
    container = await guest.start("/bin/sleep", "1000")
    limits = oci_pb2.LinuxResources(
        Memory=oci_pb2.LinuxMemory(Limit=64 << 20), Pids=oci_pb2.LinuxPids(Limit=77)
    )
    await guest.call("UpdateContainer", container_id=container, resources=limits)
    stats = (await guest.call("StatsContainer", container_id=container)).cgroup_stats
    assert stats.memory_stats.usage.limit == 64 << 20
    assert stats.memory_stats.usage.usage > 0
    assert stats.pids_stats.limit == 77
    assert stats.pids_stats.current >= 1
    assert stats.cpu_stats.cpu_usage.total_usage > 0
    # Nothing given, nothing changed.
    await guest.call("UpdateContainer", container_id=container)
    stats = (await guest.call("StatsContainer", container_id=container)).cgroup_stats
    assert stats.memory_stats.usage.limit == 64 << 20
    await guest.remove(container)


async def test_the_host_hears_of_a_process_killed_for_want_of_memory(guest: Guest) -> None:
    container = "hungry"
    spec = guest.spec("/bin/sh", "-c", "dd if=/dev/zero of=/dev/null bs=128M count=1")
    spec.Linux.Resources.Memory.Limit = 16 << 20
    spec.Linux.Resources.Memory.Swap = 16 << 20
    await guest.call("CreateContainer", container_id=container, OCI=spec)
    events: list[str] = []

    async def listen() -> None:
        events.append((await guest.call("GetOOMEvent")).container_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await guest.call("StartContainer", container_id=container)
    assert events == [container]
    assert (await guest.wait(container)).status != 0
    await guest.remove(container)


async def test_containers_share_a_pid_namespace_if_asked(guest: Guest) -> None:
    """Each says itself that it runs: the answer to a start only means that the init process may go on."""
    names = ("first", "second")
    for name in names:
        spec = guest.spec("/bin/sh", "-c", "echo here; read line")
        await guest.call("CreateContainer", container_id=name, OCI=spec, sandbox_pidns=True)
        await guest.call("StartContainer", container_id=name)
        assert (await guest.call("ReadStdout", container_id=name, len=100)).data == b"here\n"
    process = await guest.exec("first", "/bin/sh", "-c", "cat /proc/[0-9]*/cmdline")
    assert (await guest.read_all("first", process)).count(b"echo here; read line") == 2
    for name in reversed(names):
        await guest.remove(name)


async def test_capabilities_of_the_container_are_those_of_an_exec_that_names_none(guest: Guest) -> None:
    spec = guest.spec("/bin/sleep", "1000")
    for kind in ("Bounding", "Effective", "Permitted"):
        getattr(spec.Process.Capabilities, kind).append("CAP_CHOWN")
    await guest.call("CreateContainer", container_id="weak", OCI=spec)
    await guest.call("StartContainer", container_id="weak")
    process = await guest.exec("weak", "/bin/sh", "-c", "head -n 100 /proc/self/status")
    assert b"CapEff:\t0000000000000001" in await guest.read_all("weak", process)
    await guest.remove("weak")


async def test_sysctls_of_network_and_ipc_are_set(guest: Guest) -> None:
    spec = guest.spec("/bin/cat", "/proc/sys/net/ipv4/ip_default_ttl", "/proc/sys/kernel/shmmni")
    spec.Linux.Sysctl["net.ipv4.ip_default_ttl"] = "77"
    spec.Linux.Sysctl["kernel.shmmni"] = "1234"
    await guest.call("CreateContainer", container_id="tuned", OCI=spec)
    await guest.call("StartContainer", container_id="tuned")
    assert await guest.read_all("tuned") == b"77\n1234\n"
    await guest.remove("tuned")


async def test_the_termination_log_is_read_behind_its_mount(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("last words")
    spec = guest.spec("/bin/true")
    spec.Annotations["io.kubernetes.container.terminationMessagePath"] = "/dev/termination-log"
    spec.Mounts.append(
        oci_pb2.Mount(
            destination="/dev/termination-log", source=str(tmp_path / "log"), type="bind", options=["bind"]
        )
    )
    await guest.call("CreateContainer", container_id="dying", OCI=spec)
    answer = await guest.call("GetDiagnosticData", container_id="dying", log_type="termination_log")
    assert answer.data == "last words"
    await guest.remove("dying")


async def test_a_storage_is_mounted_for_as_long_as_a_container_uses_it(guest: Guest) -> None:
    mount_point = guest.agent.directory / "memory"
    entry = agent_pb2.Storage(
        driver="ephemeral",
        source="shm",
        fstype="tmpfs",
        mount_point=str(mount_point),
        options=["size=1m", "mode=1777", "fsgid=4321"],
    )
    for name in ("c-one", "c-two"):
        spec = guest.spec("/bin/sh", "-c", "stat -f /mnt >/dev/null; ls -ld /mnt")
        spec.Mounts.append(
            oci_pb2.Mount(destination="/mnt", source=str(mount_point), type="bind", options=["rbind"])
        )
        await guest.call("CreateContainer", container_id=name, OCI=spec, storages=[entry])

    def mounted() -> bool:
        mounts = Path(f"/proc/{guest.agent.pid}/mountinfo").read_text()
        return str(mount_point) in mounts

    assert mounted()
    await guest.remove("c-one")
    assert mounted()
    await guest.remove("c-two")
    assert not mounted()


async def test_a_failed_creation_gives_its_storages_back(guest: Guest) -> None:
    mount_point = guest.agent.directory / "lost"
    good = agent_pb2.Storage(driver="ephemeral", fstype="tmpfs", mount_point=str(mount_point))
    bad = agent_pb2.Storage(driver="unheard-of", mount_point="/nowhere")
    await fails(
        Code.INVALID_ARGUMENT,
        'unknown storage driver "unheard-of"',
        guest,
        "CreateContainer",
        container_id="unlucky",
        OCI=guest.spec("/bin/true"),
        storages=[good, bad],
    )
    assert str(mount_point) not in Path(f"/proc/{guest.agent.pid}/mountinfo").read_text()


async def test_the_mounts_of_a_container_live_until_it_is_removed(guest: Guest) -> None:
    """Symptom: a guest panicked ("VFS: Busy inodes", kernel BUG at fs/super.c) when a process ended that read
    in a file system below a volume.

    virtiofs mounts such a file system for the container alone. Linux 6.1 does not survive that it is
    unmounted, in the end of the container's last process, while something of it is still on its way.
    """

    def namespaces() -> set[str]:
        found = set()
        for descriptor in Path(f"/proc/{guest.agent.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found.add(str(descriptor.readlink()))
        return {link for link in found if link.startswith("mnt:")}

    before = namespaces()
    container = await guest.start("/bin/busybox", "readlink", "/proc/self/ns/mnt")
    (kept,) = namespaces() - before
    assert await guest.read_all(container) == f"{kept}\n".encode()
    await guest.wait(container)
    assert kept in namespaces()
    await guest.remove(container)
    assert namespaces() == before


def count(directory: str) -> int:
    return sum(1 for _ in Path(directory).iterdir())


def footprint(guest: Guest) -> dict[str, int]:
    """What a container could leave behind."""
    pid = guest.agent.pid
    return {
        "descriptors": count(f"/proc/{pid}/fd"),
        "mounts": len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines()),
        "state": sum(len(files) + len(names) for _, names, files in os.walk(guest.agent.root)),
        "children": len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()),
    }


async def test_twenty_containers_leave_nothing(guest: Guest) -> None:
    async def one() -> str:
        ports = guest.ports()
        container = await guest.start("/bin/sh", "-c", "echo something; exit 1", ports=ports)
        stdout = await guest.dial(ports[1])
        assert await stdout.receive_some() == b"something\n"
        assert (await guest.wait(container)).status == 1
        await guest.remove(container)
        await stdout.aclose()
        return container

    await one()
    before = footprint(guest)
    names = [await one() for _ in range(20)]
    with trio.fail_after(10):
        while footprint(guest)["descriptors"] > before["descriptors"]:
            await trio.sleep(0.01)  # threads that have just lost their connection close it in a moment
    assert footprint(guest) == before
    threads = count(f"/proc/{guest.agent.pid}/task")
    assert threads < 30
    left = [path for path, _, _ in os.walk("/sys/fs/cgroup") if path.rsplit("/", 1)[-1] in names]
    assert left == []


async def test_an_exec_that_cannot_be_started_tells_its_own_reason_alone(guest: Guest) -> None:
    """The runtime appends to its log: a later failure once came with all earlier ones before it."""
    container_id = await guest.start("sleep", "1000")
    for program in ("/no/such/one", "/no/such/other"):
        with pytest.raises(StatusError) as refused:
            await guest.exec(container_id, program)
        assert refused.value.status.message.count("/no/such/") == 1
        assert program in refused.value.status.message
    await guest.remove(container_id)
