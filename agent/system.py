"""The guest as a whole: its processors and memory, clock, random numbers, swap, and what it tells about
itself.
"""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

from agent import modules, schema, storage
from agent.errors import InvalidArgument, NotFound, RuntimeFailed, Unsupported
from agent.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.reaper import Reaper
    from agent.schema import agent as messages

CPUS = "/sys/devices/system/cpu"
MEMORY = "/sys/devices/system/memory"
CPU_TRIES, CPU_INTERVAL = 100, 0.05  # as in Kata's agent: nothing tells when a processor has been made

RNDADDTOENTCNT, RNDRESEEDCRNG = 0x40045201, 0x5207  # linux/random.h
PAGE_SIZE = 4096

DEVICE_HANDLERS = ("blk", "mmioblk", "nvdimm", "scsi")
FEATURES = ("stdio-streams", "network-stats")


# What there is


def details(*, block_size: bool, probe: bool) -> messages.GuestDetailsResponse:
    """Say what this guest and agent can do."""
    return schema.agent.GuestDetailsResponse(
        mem_block_size_bytes=memory_block_size() if block_size else 0,
        support_mem_hotplug_probe=probe and os.path.exists(f"{MEMORY}/probe"),
        agent_details=schema.agent.AgentDetails(
            version=VERSION,
            init_daemon=os.getpid() == 1,
            device_handlers=DEVICE_HANDLERS,
            storage_handlers=storage.handlers(),
            supports_seccomp=_has_seccomp(),
            extra_features=FEATURES,
        ),
    )


def memory_block_size() -> int:
    """Return how much memory can be added at once, in bytes; 0 if none can."""
    try:
        with open(f"{MEMORY}/block_size_bytes", encoding="utf-8") as file:
            return int(file.read(), 16)
    except (OSError, ValueError):
        return 0


def _has_seccomp() -> bool:
    return os.path.exists("/proc/sys/kernel/seccomp/actions_avail")


# Processors and memory


def online(cpus: int, *, memory: bool) -> None:
    """Bring processors that were plugged in on line, this many, and all memory.

    Raises:
        RuntimeFailed: there are not enough.
    """
    if cpus:
        _online_cpus(cpus)
    if memory:
        for path in _states(MEMORY, "memory"):
            _switch_on(path)


def _online_cpus(wanted: int) -> None:
    done = 0
    for attempt in range(CPU_TRIES):
        if attempt:
            time.sleep(CPU_INTERVAL)
        states = list(_states(CPUS, "cpu"))
        for path in states:
            if done < wanted and _switch_on(path):
                done += 1
        # Some are brought on line by the kernel itself: then there is nothing left to do.
        if done >= wanted or (states and attempt and all(_read(path) != "0" for path in states)):
            return
    raise RuntimeFailed(f"failed to online {wanted} CPU(s) after {CPU_TRIES} retries: {done} done")


def _states(base: str, prefix: str) -> Iterable[str]:
    """Return the switches of all numbered things in a directory of sysfs."""
    try:
        names = os.listdir(base)
    except FileNotFoundError:
        return
    for name in names:
        path = f"{base}/{name}/online"
        if name.removeprefix(prefix).isdigit() and os.path.exists(path):
            yield path


def _switch_on(path: str) -> bool:
    """Switch something on; whether it was off before."""
    if _read(path) != "0":
        return False
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write("1")
    except OSError:
        return False
    return True


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def probe_memory(addresses: Iterable[int]) -> None:
    """Tell the kernel where memory was plugged in, on machines that do not tell it themselves."""
    path = f"{MEMORY}/probe"
    if not os.path.exists(path):
        raise Unsupported("this guest's kernel finds plugged memory by itself: it has no probe file")
    for address in addresses:
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"{address:#x}")


# Clock, random numbers, swap


def set_clock(seconds: int, microseconds: int) -> None:
    """Set the time of day."""
    time.clock_settime_ns(time.CLOCK_REALTIME, (seconds * 1_000_000 + microseconds) * 1000)


def reseed(data: bytes) -> None:
    """Mix data into the kernel's random numbers, as entropy, and use it from now on."""
    import fcntl

    if not data:
        raise InvalidArgument("missing entropy data")
    fd = os.open("/dev/random", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, data)
        fcntl.ioctl(fd, RNDADDTOENTCNT, struct.pack("i", len(data) * 8))
        fcntl.ioctl(fd, RNDRESEEDCRNG, 0)
    finally:
        os.close(fd)


def swap_on(path: str) -> None:
    """Use a block device as swap."""
    from agent import syscalls

    syscalls.swap_on(path)


# Network filters


def iptables(reaper: Reaper, *, ipv6: bool, rules: bytes | None = None) -> bytes:
    """Return the rules of the packet filter, or set them."""
    name = ("ip6tables" if ipv6 else "iptables") + ("-save" if rules is None else "-restore")
    for directory in ("/usr/sbin", "/sbin"):
        if os.path.exists(f"{directory}/{name}"):
            modules.load("ip6_tables" if ipv6 else "ip_tables")
            argv = [f"{directory}/{name}", *(() if rules is None else ("--wait", "5"))]
            return reaper.run(argv, data=rules or b"")[1]
    raise Unsupported(f"this guest has no {name}")


# Volumes


def volume_stats(path: str) -> messages.VolumeStatsResponse:
    """Say how full the file system at a path is."""
    try:
        status = os.statvfs(path)
    except FileNotFoundError:
        raise NotFound(f"no volume at {path}") from None
    kinds = schema.agent
    return kinds.VolumeStatsResponse(
        usage=[
            kinds.VolumeUsage(
                total=status.f_blocks * status.f_frsize,
                used=(status.f_blocks - status.f_bfree) * status.f_frsize,
                available=status.f_bavail * status.f_frsize,
                unit=kinds.VolumeUsage.BYTES,
            ),
            kinds.VolumeUsage(
                total=status.f_files,
                used=status.f_files - status.f_ffree,
                available=status.f_favail,
                unit=kinds.VolumeUsage.INODES,
            ),
        ],
        volume_condition=kinds.VolumeCondition(message="OK"),
    )
