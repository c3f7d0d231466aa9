"""Statistics of a cgroup, as the agent API has them. Pure: `read(controller, file)` brings the text of a
file.

The API was made for version 1; where version 2 counts something else, the nearest is taken, and what has no
counterpart stays 0. Times are nanoseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent import schema
from agent.cgroups import UNLIMITED, pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.schema import agent as messages

    Read = Callable[[str, str], str]

NS_PER_US = 1000
NS_PER_TICK = 10_000_000  # USER_HZ is 100: cpuacct.stat counts in it, whatever the kernel's own rate is
# A page counter without a limit: LONG_MAX in whole pages. memory.limit_in_bytes shows this number.
V1_UNLIMITED = 0x7FFFFFFFFFFFF000
HUGE_PAGE_SIZES = ("2MB", "1GB", "64KB", "32MB", "16MB", "512MB", "16GB")


def number(text: str) -> int:
    """Parse a file with one number; "max" is the largest one, and nothing is 0."""
    text = text.strip()
    if text == "max":
        return UNLIMITED
    return int(text) if text.isdigit() else 0


def version2(read: Read) -> messages.CgroupStats:
    """Return the statistics of a version 2 cgroup."""
    cpu, memory = pairs(read("cpu", "cpu.stat")), pairs(read("memory", "memory.stat"))
    events = pairs(read("memory", "memory.events"))
    kinds = schema.agent
    return kinds.CgroupStats(
        cpu_stats=kinds.CpuStats(
            cpu_usage=kinds.CpuUsage(
                total_usage=cpu.get("usage_usec", 0) * NS_PER_US,
                usage_in_kernelmode=cpu.get("system_usec", 0) * NS_PER_US,
                usage_in_usermode=cpu.get("user_usec", 0) * NS_PER_US,
            ),
            throttling_data=kinds.ThrottlingData(
                periods=cpu.get("nr_periods", 0),
                throttled_periods=cpu.get("nr_throttled", 0),
                throttled_time=cpu.get("throttled_usec", 0) * NS_PER_US,
            ),
        ),
        memory_stats=kinds.MemoryStats(
            cache=memory.get("file", 0),
            usage=kinds.MemoryData(
                usage=number(read("memory", "memory.current")),
                max_usage=number(read("memory", "memory.peak")),
                failcnt=events.get("max", 0),
                limit=number(read("memory", "memory.max")),
            ),
            swap_usage=kinds.MemoryData(
                usage=number(read("memory", "memory.swap.current")),
                max_usage=number(read("memory", "memory.swap.peak")),
                failcnt=pairs(read("memory", "memory.swap.events")).get("max", 0),
                limit=number(read("memory", "memory.swap.max")),
            ),
            kernel_usage=kinds.MemoryData(usage=memory.get("kernel", 0)),
            use_hierarchy=True,
            stats=_with_kills(memory, events),
        ),
        pids_stats=_pids(read),
        blkio_stats=_io_stat(read("io", "io.stat")),
        hugetlb_stats={
            size: kinds.HugetlbStats(
                usage=number(usage),
                max_usage=number(read("hugetlb", f"hugetlb.{size}.max")),
                failcnt=pairs(read("hugetlb", f"hugetlb.{size}.events")).get("max", 0),
            )
            for size in HUGE_PAGE_SIZES
            if (usage := read("hugetlb", f"hugetlb.{size}.current"))
        },
    )


def version1(read: Read) -> messages.CgroupStats:
    """Return the statistics of version 1 cgroups."""
    ticks, throttling = pairs(read("cpuacct", "cpuacct.stat")), pairs(read("cpu", "cpu.stat"))
    memory = pairs(read("memory", "memory.stat"))
    kinds = schema.agent
    return kinds.CgroupStats(
        cpu_stats=kinds.CpuStats(
            cpu_usage=kinds.CpuUsage(
                total_usage=number(read("cpuacct", "cpuacct.usage")),
                percpu_usage=[int(text) for text in read("cpuacct", "cpuacct.usage_percpu").split()],
                usage_in_kernelmode=ticks.get("system", 0) * NS_PER_TICK,
                usage_in_usermode=ticks.get("user", 0) * NS_PER_TICK,
            ),
            throttling_data=kinds.ThrottlingData(
                periods=throttling.get("nr_periods", 0),
                throttled_periods=throttling.get("nr_throttled", 0),
                throttled_time=throttling.get("throttled_time", 0),
            ),
        ),
        memory_stats=kinds.MemoryStats(
            cache=memory.get("cache", 0),
            usage=_memory_v1(read, "memory"),
            swap_usage=_memory_v1(read, "memory.memsw"),
            kernel_usage=_memory_v1(read, "memory.kmem"),
            use_hierarchy=number(read("memory", "memory.use_hierarchy")) == 1,
            stats=_with_kills(memory, pairs(read("memory", "memory.oom_control"))),
        ),
        pids_stats=_pids(read),
        blkio_stats=kinds.BlkioStats(
            io_service_bytes_recursive=_blkio(read("blkio", "blkio.throttle.io_service_bytes_recursive")),
            io_serviced_recursive=_blkio(read("blkio", "blkio.throttle.io_serviced_recursive")),
        ),
        hugetlb_stats={
            size: kinds.HugetlbStats(
                usage=number(usage),
                max_usage=number(read("hugetlb", f"hugetlb.{size}.max_usage_in_bytes")),
                failcnt=number(read("hugetlb", f"hugetlb.{size}.failcnt")),
            )
            for size in HUGE_PAGE_SIZES
            if (usage := read("hugetlb", f"hugetlb.{size}.usage_in_bytes"))
        },
    )


def _with_kills(memory: dict[str, int], events: dict[str, int]) -> dict[str, int]:
    """Add how many processes were killed for want of memory: the host tells its clients, and counts by it."""
    return {**memory, "oom_kill": events["oom_kill"]} if "oom_kill" in events else memory


def _memory_v1(read: Read, prefix: str) -> messages.MemoryData:
    limit = number(read("memory", f"{prefix}.limit_in_bytes"))
    return schema.agent.MemoryData(
        usage=number(read("memory", f"{prefix}.usage_in_bytes")),
        max_usage=number(read("memory", f"{prefix}.max_usage_in_bytes")),
        failcnt=number(read("memory", f"{prefix}.failcnt")),
        limit=UNLIMITED if limit == V1_UNLIMITED else limit,
    )


def _pids(read: Read) -> messages.PidsStats:
    """Return the numbers of tasks; a limit of 0 means none, as in Kata's agent."""
    limit = number(read("pids", "pids.max"))
    return schema.agent.PidsStats(
        current=number(read("pids", "pids.current")), limit=0 if limit == UNLIMITED else limit
    )


def _io_stat(text: str) -> messages.BlkioStats:
    """Parse io.stat: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6" for each device."""
    service_bytes: list[messages.BlkioStatsEntry] = []
    serviced: list[messages.BlkioStatsEntry] = []
    for line in text.splitlines():
        device, *fields = line.split()
        major, _, minor = device.partition(":")
        values = dict(field.split("=", 1) for field in fields if "=" in field)
        for name, operation, entries in (
            ("rbytes", "read", service_bytes),
            ("wbytes", "write", service_bytes),
            ("rios", "read", serviced),
            ("wios", "write", serviced),
        ):
            if name in values and major.isdigit() and minor.isdigit():
                entries.append(_entry(major, minor, operation, values[name]))
    return schema.agent.BlkioStats(io_service_bytes_recursive=service_bytes, io_serviced_recursive=serviced)


def _blkio(text: str) -> Iterable[messages.BlkioStatsEntry]:
    """Parse a blkio file: "8:0 Read 123" for each device and operation, and a sum without a device at the
    end.
    """
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 3 and ":" in fields[0]:
            major, _, minor = fields[0].partition(":")
            yield _entry(major, minor, fields[1].lower(), fields[2])


def _entry(major: str, minor: str, operation: str, value: str) -> messages.BlkioStatsEntry:
    return schema.agent.BlkioStatsEntry(major=int(major), minor=int(minor), op=operation, value=int(value))
