"""The sandbox as a whole, its network and its files, with the real agent."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from protos.kata import agent_pb2, health_pb2, types_pb2
from tests.harness.agent import AGENT, HEALTH, connect
from ttrpc.client import Client, ConnectionClosed
from ttrpc.status import Code, StatusError

if TYPE_CHECKING:
    from tests.harness.agent import Guest, RunningAgent

pytestmark = pytest.mark.integration

MAC = "02:00:00:00:00:07"


def run_in_guest(agent: RunningAgent, *argv: str) -> str:
    """Run a program of the host in the namespaces of the agent."""
    prefix = ["nsenter", f"--target={agent.pid}", "--net", "--uts", "--mount", "--pid", "--"]
    return subprocess.run([*prefix, *argv], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def link(agent: RunningAgent) -> None:
    """A link in the guest's network, with a hardware address of ours."""
    run_in_guest(agent, "ip", "link", "add", "some", "address", MAC, "type", "veth", "peer", "name", "other")
    run_in_guest(agent, "ip", "link", "set", "other", "up")


async def test_the_agent_is_healthy_and_says_what_it_is(guest: Guest) -> None:
    check, version = HEALTH["Check"], HEALTH["Version"]
    answer = await guest.client.call(check, check.request_class())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert (await guest.client.call(version, version.request_class())).agent_version
    details = await guest.call("GetGuestDetails", mem_block_size=True)
    assert details.agent_details.version
    assert "stdio-streams" in details.agent_details.extra_features
    assert "virtio-fs" in details.agent_details.storage_handlers


async def test_a_sandbox_is_made_and_destroyed(guest: Guest) -> None:
    mount_point = str(guest.agent.directory / "shm")
    shm = agent_pb2.Storage(
        driver="ephemeral", source="shm", fstype="tmpfs", mount_point=mount_point, options=["size=65536"]
    )
    await guest.call(
        "CreateSandbox", sandbox_id="sb", hostname="box" * 30, dns=["nameserver 192.0.2.1"], storages=[shm]
    )
    assert run_in_guest(guest.agent, "hostname").strip() == ("box" * 30)[:64]
    assert run_in_guest(guest.agent, "cat", "/etc/resolv.conf") == "nameserver 192.0.2.1\n"
    with pytest.raises(StatusError) as caught:
        await guest.call("CreateSandbox", sandbox_id="sb")
    assert caught.value.code == Code.ALREADY_EXISTS
    container = await guest.start("/bin/sh", "-c", "hostname; sleep 1000")
    assert (await guest.call("ReadStdout", container_id=container, len=100)).data.startswith(b"box")
    await guest.call("DestroySandbox")
    assert mount_point not in run_in_guest(guest.agent, "cat", "/proc/self/mountinfo")
    assert "192.0.2.1" not in run_in_guest(guest.agent, "cat", "/etc/resolv.conf")
    with pytest.raises(StatusError, match="InvalidContainerId"):
        await guest.call("StatsContainer", container_id=container)


async def test_what_nobody_implements_is_answered_so(guest: Guest) -> None:
    for name in ("SetPolicy", "ResizeVolume", "MemAgentMemcgSet"):
        with pytest.raises(StatusError) as caught:
            await guest.call(name)
        assert caught.value.code == Code.UNIMPLEMENTED


async def test_garbage_ends_its_own_connection_and_nothing_else(guest: Guest) -> None:
    for garbage in (b"\0" * 64, os.urandom(4096), b"\xff" * 1000):
        stream = await connect(guest.agent)
        try:
            await stream.send_all(garbage)
            await stream.send_eof()
            with trio.fail_after(10):
                while await stream.receive_some():
                    pass
        except trio.BrokenResourceError:
            pass
        await stream.aclose()
    assert (await guest.call("GetGuestDetails")).agent_details.version


async def test_a_connection_that_ends_leaves_the_containers_alone(guest: Guest, agent: RunningAgent) -> None:
    async with trio.open_nursery() as nursery:
        other = Client(await connect(agent))
        nursery.start_soon(other.run)
        container = await guest.start("/bin/sh", "-c", "read line; exit 12")
        method = AGENT["WaitProcess"]

        async def wait() -> None:
            with pytest.raises(ConnectionClosed):
                await other.call(method, method.request_class(container_id=container))

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await other.aclose()
    await guest.call("SignalProcess", container_id=container, signal=9)
    assert (await guest.wait(container)).status == 137
    await guest.remove(container)


@pytest.mark.usefixtures("link")
async def test_a_network_is_set_up_as_the_host_says(guest: Guest) -> None:
    address = types_pb2.IPAddress(address="192.0.2.5", mask="24")
    address6 = types_pb2.IPAddress(family="v6", address="2001:db8::5", mask="64")
    interface = types_pb2.Interface(
        device="eth0", name="eth0", hwAddr=MAC, mtu=1400, IPAddresses=[address, address6]
    )
    await guest.call("UpdateInterface", interface=interface)
    shown = run_in_guest(guest.agent, "ip", "address", "show", "dev", "eth0")
    assert "192.0.2.5/24" in shown
    assert "2001:db8::5/64" in shown
    assert "mtu 1400" in shown
    # The same again, with one address less: what is not wanted goes.
    del interface.IPAddresses[1]
    await guest.call("UpdateInterface", interface=interface)
    assert "2001:db8::5" not in run_in_guest(guest.agent, "ip", "address", "show", "dev", "eth0")
    listed = (await guest.call("ListInterfaces")).Interfaces
    mine = next(entry for entry in listed if entry.name == "eth0")
    assert (mine.hwAddr, mine.mtu) == (MAC, 1400)
    assert "192.0.2.5" in [entry.address for entry in mine.IPAddresses]

    # The gateway comes first here, and must be added last.
    routes = [
        types_pb2.Route(dest="", gateway="198.51.100.1", device="eth0"),
        types_pb2.Route(dest="198.51.100.0/24", device="eth0", scope=253),
    ]
    answer = await guest.call("UpdateRoutes", routes=agent_pb2.Routes(Routes=routes))
    assert {(r.dest, r.gateway) for r in answer.Routes} >= {("", "198.51.100.1"), ("198.51.100.0/24", "")}
    assert "default via 198.51.100.1 dev eth0" in run_in_guest(guest.agent, "ip", "route")
    await guest.call("UpdateRoutes", routes=agent_pb2.Routes(Routes=routes))
    assert [r.dest for r in (await guest.call("ListRoutes")).Routes].count("") == 1

    neighbour = types_pb2.ARPNeighbor(
        toIPAddress=types_pb2.IPAddress(address="192.0.2.9"), device="eth0", lladdr="02:00:00:00:00:09"
    )
    await guest.call("AddARPNeighbors", neighbors=agent_pb2.ARPNeighbors(ARPNeighbors=[neighbour]))
    shown = run_in_guest(guest.agent, "ip", "neighbour", "show", "dev", "eth0")
    assert "192.0.2.9 lladdr 02:00:00:00:00:09 PERMANENT" in shown

    container = await guest.start("/bin/sleep", "1000")
    stats = await guest.call("StatsContainer", container_id=container)
    assert "eth0" in [entry.name for entry in stats.network_stats]
    await guest.remove(container)


async def test_a_link_that_is_not_there_is_told_in_the_words_that_hosts_look_for(guest: Guest) -> None:
    interface = types_pb2.Interface(name="eth9", hwAddr="02:00:00:00:00:99")
    with pytest.raises(StatusError, match="Link not found"):
        await guest.call("UpdateInterface", interface=interface)


async def test_files_are_copied_piece_by_piece_and_never_outside(guest: Guest) -> None:
    share = guest.agent.root / "shared/containers"
    path = f"{share}/c/some/file"
    fields = {"path": path, "file_size": 6, "file_mode": stat.S_IFREG | 0o640, "dir_mode": 0o750, "uid": 7}
    await guest.call("CopyFile", **fields, data=b"abc")
    assert not Path(path).exists()
    await guest.call("CopyFile", **fields, data=b"def", offset=3)
    assert Path(path).read_bytes() == b"abcdef"
    assert (Path(path).stat().st_mode & 0o7777, Path(path).stat().st_uid) == (0o640, 7)

    await guest.call("CopyFile", path=f"{share}/c/link", file_mode=stat.S_IFLNK | 0o777, data=b"/etc")
    assert Path(f"{share}/c/link").readlink() == Path("/etc")
    await guest.call("CopyFile", path=f"{share}/c/dir", file_mode=stat.S_IFDIR | 0o711)
    assert Path(f"{share}/c/dir").stat().st_mode & 0o777 == 0o711
    for outside in ("/etc/passwd", f"{share}/../x", f"{share}/c/link/planted"):
        with pytest.raises(StatusError):
            await guest.call("CopyFile", path=outside, file_mode=stat.S_IFREG | 0o644, data=b"x")
    assert not Path("/etc/planted").exists()
    with pytest.raises(StatusError, match="names nothing"):
        await guest.call("CopyFile", path=f"{share}/./", file_mode=stat.S_IFREG | 0o644, data=b"x")


async def test_a_newer_wait_for_events_takes_over(guest: Guest) -> None:
    """Symptom: an event is lost after a reconnect. Cause: a call of the old connection still waited, and
    took it."""
    await guest.call("CreateSandbox", sandbox_id="events")
    async with trio.open_nursery() as nursery:
        refused: list[StatusError] = []

        async def listen() -> None:
            with pytest.raises(StatusError, match="a newer call") as caught:
                await guest.call("GetOOMEvent")
            refused.append(caught.value)
            nursery.cancel_scope.cancel()

        nursery.start_soon(listen)
        nursery.start_soon(listen)
    assert [error.code for error in refused] == [Code.FAILED_PRECONDITION]
    await guest.call("DestroySandbox")


async def test_metrics_and_volumes(guest: Guest) -> None:
    assert "kata_guest_meminfo" in (await guest.call("GetMetrics")).metrics
    answer = await guest.call("GetVolumeStats", volume_guest_path="/")
    assert [entry.unit for entry in answer.usage] == [1, 2]
    assert answer.usage[0].total >= answer.usage[0].used > 0
    with pytest.raises(StatusError) as caught:
        await guest.call("GetVolumeStats", volume_guest_path="/nowhere")
    assert caught.value.code == Code.NOT_FOUND


async def test_small_services(guest: Guest) -> None:
    await guest.call("OnlineCPUMem", cpu_only=True)
    await guest.call("RemoveStaleVirtiofsShareMounts")
    await guest.call("ReseedRandomDev", data=os.urandom(64))
    with pytest.raises(StatusError, match="missing entropy data"):
        await guest.call("ReseedRandomDev")
