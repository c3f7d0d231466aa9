"""What a guest does once before it is saved, so that no copy of it is the first to do it.

A guest's first container costs several times what the second one does: programs are read and unpacked from
the disk, the agent imports what it needs. So a small container runs in it, out of files that the guest has
itself, and is removed. The rule: nothing of it stays but what the guest remembers anyway, and a guest that
cannot do it (a stock one may have other programs) becomes a template all the same.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any

import trio

from protos.kata import agent_pb2
from vc.agent_client.client import STREAMS_FEATURE, AgentClient
from vc.errors import GuestGone, VCError
from vc.oci.mounts import Mount
from vc.oci.translate import guest_process, guest_spec

log = logging.getLogger(__name__)

SEED_BYTES = 64
NAME = "warm-up"
ROOT = f"/run/kata-containers/{NAME}"
BUSYBOX = "/bin/busybox"
TIMEOUT = 30.0  # seconds for all of it, on a host that emulates
READ_SIZE = 4096  # bytes

# As containerd's default specification has them.
_PROCESS: dict[str, Any] = {
    "user": {"uid": 0, "gid": 0},
    "args": [BUSYBOX, "cat"],
    "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
    "cwd": "/",
    "capabilities": {name: ["CAP_CHOWN", "CAP_KILL"] for name in ("bounding", "effective", "permitted")},
    "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
    "noNewPrivileges": True,
}
_SPEC: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": _PROCESS,
    "root": {"path": "rootfs", "readonly": True},
    "linux": {
        "namespaces": [{"type": name} for name in ("pid", "ipc", "uts", "mount")],
        "cgroupsPath": f"/{NAME}",
        "maskedPaths": ["/proc/kcore", "/sys/firmware"],
        "readonlyPaths": ["/proc/sys", "/proc/bus"],
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    },
}
_MOUNTS = (
    Mount("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    Mount("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620")),
    Mount("/dev/shm", "shm", "tmpfs", ("nosuid", "noexec", "nodev", "mode=1777")),  # noqa: S108 - the guest's
    Mount("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
    Mount("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
)


async def warm_up(agent: AgentClient, details: agent_pb2.GuestDetailsResponse) -> None:
    """Do what every restored guest will be asked to do. Raises: GuestGone."""
    await agent.reseed_random(secrets.token_bytes(SEED_BYTES))
    now = time.time_ns() // 1000
    await agent.set_clock(now // 1_000_000, now % 1_000_000)
    streams = STREAMS_FEATURE in details.agent_details.extra_features
    try:
        with trio.fail_after(TIMEOUT):
            await _run_container(agent, streams=streams)
    except GuestGone:
        raise
    except (VCError, trio.TooSlowError) as exc:
        log.warning("the template's guest is not warmed up completely: %s", exc)


async def _run_container(agent: AgentClient, *, streams: bool) -> None:
    """Run a container that waits for its stdin, with a second process in it, to its end."""
    root = agent_pb2.Storage(
        driver="bind", source="/", fstype="bind", mount_point=ROOT, options=["bind", "ro"]
    )
    request = agent_pb2.CreateContainerRequest(
        container_id=NAME,
        exec_id=NAME,
        storages=[root],
        OCI=guest_spec(_SPEC, root_path=ROOT, mounts=_MOUNTS, seccomp=False).spec,
    )
    ports = _choose_ports(agent, request) if streams else []
    await agent.create_container(request, timeout=TIMEOUT)
    try:
        init = [await agent.dial(port) for port in ports]
        await agent.start_container(NAME)
        await _exec(agent, streams=streams)
        if init:
            await init[0].send_all(b"\n")
            await init[0].send_eof()
        else:
            await agent.close_stdin(NAME, NAME)
        await _drain(init[1:])
        await agent.wait_process(NAME, NAME)
        await agent.stats_container(NAME)
        for stream in init:
            await stream.aclose()
    finally:
        await agent.remove_container(NAME)


async def _exec(agent: AgentClient, *, streams: bool) -> None:
    process = guest_process({**_PROCESS, "args": [BUSYBOX, "true"]})
    request = agent_pb2.ExecProcessRequest(container_id=NAME, exec_id="second", process=process)
    ports = _choose_ports(agent, request) if streams else []
    await agent.exec_process(request)
    opened = [await agent.dial(port) for port in ports]
    await _drain(opened[1:])
    await agent.wait_process(NAME, "second")
    for stream in opened:
        await stream.aclose()


def _choose_ports(
    agent: AgentClient, request: agent_pb2.CreateContainerRequest | agent_pb2.ExecProcessRequest
) -> list[int]:
    request.stdin_port, request.stdout_port, request.stderr_port = (agent.new_port() for _ in range(3))
    return [request.stdin_port, request.stdout_port, request.stderr_port]


async def _drain(streams: list[trio.abc.HalfCloseableStream]) -> None:
    """Read streams to their ends, one after the other: little comes."""
    for stream in streams:
        while await stream.receive_some(READ_SIZE):
            pass
