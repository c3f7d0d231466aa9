"""A container's counters, from the guest's words to containerd's. Pure but for one look at the host.

The guest counts by its own cgroup hierarchy, containerd's Prometheus collector wants the host's, and the two
need not be the same; so each field has a name of either version to be filled from. The sub-messages that some
client reads without asking whether they are there are always there, even empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

from protos.containerd import cgroups_v1_pb2 as v1
from protos.containerd import cgroups_v2_pb2 as v2
from protos.kata.agent_pb2 import MemoryData, StatsContainerResponse

CGROUP_ROOT = Path("/sys/fs/cgroup")

# memory.stat keys of cgroup v1 that are the names of v1.MemoryStat's fields but for their spelling, and what
# cgroup v2 counts instead (kernel documentation, cgroup-v1/memory.rst and cgroup-v2.rst).
V1_MEMORY: Mapping[str, tuple[str, ...]] = {
    "cache": ("cache", "file"),
    "rss": ("rss", "anon"),
    "rss_huge": ("rss_huge", "anon_thp"),
    "mapped_file": ("mapped_file", "file_mapped"),
    "dirty": ("dirty", "file_dirty"),
    "writeback": ("writeback", "file_writeback"),
    "pg_pg_in": ("pgpgin",),
    "pg_pg_out": ("pgpgout",),
    "pg_fault": ("pgfault",),
    "pg_maj_fault": ("pgmajfault",),
    "inactive_anon": ("inactive_anon",),
    "active_anon": ("active_anon",),
    "inactive_file": ("inactive_file",),
    "active_file": ("active_file",),
    "unevictable": ("unevictable",),
    "hierarchical_memory_limit": ("hierarchical_memory_limit",),
    "hierarchical_swap_limit": ("hierarchical_memsw_limit",),
    "total_cache": ("total_cache", "file"),
    "total_rss": ("total_rss", "anon"),
    "total_rss_huge": ("total_rss_huge", "anon_thp"),
    "total_mapped_file": ("total_mapped_file", "file_mapped"),
    "total_dirty": ("total_dirty", "file_dirty"),
    "total_writeback": ("total_writeback", "file_writeback"),
    "total_pg_pg_in": ("total_pgpgin",),
    "total_pg_pg_out": ("total_pgpgout",),
    "total_pg_fault": ("total_pgfault", "pgfault"),
    "total_pg_maj_fault": ("total_pgmajfault", "pgmajfault"),
    "total_inactive_anon": ("total_inactive_anon", "inactive_anon"),
    "total_active_anon": ("total_active_anon", "active_anon"),
    "total_inactive_file": ("total_inactive_file", "inactive_file"),
    "total_active_file": ("total_active_file", "active_file"),
    "total_unevictable": ("total_unevictable", "unevictable"),
}
# The same for v2.MemoryStat. Of v1's counters the total_ ones include the cgroups below, as v2's do.
V2_MEMORY: Mapping[str, tuple[str, ...]] = {
    "anon": ("anon", "total_rss", "rss"),
    "file": ("file", "total_cache", "cache"),
    "file_mapped": ("file_mapped", "total_mapped_file", "mapped_file"),
    "file_dirty": ("file_dirty", "total_dirty", "dirty"),
    "file_writeback": ("file_writeback", "total_writeback", "writeback"),
    "anon_thp": ("anon_thp", "total_rss_huge", "rss_huge"),
    "inactive_anon": ("inactive_anon", "total_inactive_anon"),
    "active_anon": ("active_anon", "total_active_anon"),
    "inactive_file": ("inactive_file", "total_inactive_file"),
    "active_file": ("active_file", "total_active_file"),
    "unevictable": ("unevictable", "total_unevictable"),
    "pgfault": ("pgfault", "total_pgfault"),
    "pgmajfault": ("pgmajfault", "total_pgmajfault"),
}
# Counters that only cgroup v2 has, under one name in memory.stat and in v2.MemoryStat.
V2_ONLY = frozenset(
    {
        *("kernel_stack", "slab", "sock", "shmem", "slab_reclaimable", "slab_unreclaimable"),
        *("workingset_refault", "workingset_activate", "workingset_nodereclaim"),
        *("pgrefill", "pgscan", "pgsteal", "pgactivate", "pgdeactivate", "pglazyfree", "pglazyfreed"),
        *("thp_fault_alloc", "thp_collapse_alloc"),
    }
)
CPU_SUMS = ("total_usage", "usage_in_kernelmode", "usage_in_usermode")  # of agent.proto's CpuUsage
MEMORY_SUMS = ("usage", "swap_usage", "kernel_usage")  # of agent.proto's MemoryStats


def host_is_unified(root: Path = CGROUP_ROOT) -> bool:
    """Say whether the host runs cgroup v2 alone: only then is this file at the top of the hierarchy."""
    return (root / "cgroup.controllers").exists()


def total(parts: Iterable[StatsContainerResponse]) -> StatsContainerResponse:
    """Return the counters of several containers of one VM as if they were one without limits."""
    out = StatsContainerResponse()
    group = out.cgroup_stats
    for part in parts:
        more = part.cgroup_stats
        _add(group.cpu_stats.cpu_usage, more.cpu_stats.cpu_usage, CPU_SUMS)
        group.pids_stats.current += more.pids_stats.current
        for name in MEMORY_SUMS:
            _add(getattr(group.memory_stats, name), getattr(more.memory_stats, name), ("usage",))
        for name, count in more.memory_stats.stats.items():
            if not name.startswith("hierarchical_"):
                group.memory_stats.stats[name] += count
        if not out.network_stats:
            out.network_stats.extend(part.network_stats)  # the VM's, which are the same for all
    return out


def _add(out: Message, more: Message, names: Iterable[str]) -> None:
    for name in names:
        setattr(out, name, getattr(out, name) + getattr(more, name))


def metrics(stats: StatsContainerResponse, *, unified: bool, oom_kills: int = 0) -> Any:
    """Return the counters as the host's containerd takes them."""
    message = metrics_v2(stats, oom_kills) if unified else metrics_v1(stats, oom_kills)
    return Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def metrics_v1(stats: StatsContainerResponse, oom_kills: int = 0) -> v1.Metrics:
    """Return the counters in the form of cgroup v1."""
    group = stats.cgroup_stats
    out = v1.Metrics()
    out.pids.SetInParent()
    out.pids.current, out.pids.limit = group.pids_stats.current, group.pids_stats.limit
    usage = group.cpu_stats.cpu_usage
    out.cpu.usage.total = usage.total_usage
    out.cpu.usage.kernel, out.cpu.usage.user = usage.usage_in_kernelmode, usage.usage_in_usermode
    out.cpu.usage.per_cpu.extend(usage.percpu_usage)
    throttling = group.cpu_stats.throttling_data
    out.cpu.throttling.SetInParent()
    out.cpu.throttling.periods = throttling.periods
    out.cpu.throttling.throttled_periods = throttling.throttled_periods
    out.cpu.throttling.throttled_time = throttling.throttled_time
    memory = group.memory_stats
    for field, names in V1_MEMORY.items():
        setattr(out.memory, field, _first(memory.stats, names))
    _fill_entry(out.memory.usage, memory.usage)
    _fill_entry(out.memory.swap, memory.swap_usage)
    _fill_entry(out.memory.kernel, memory.kernel_usage)
    out.memory.kernel_tcp.SetInParent()
    out.memory_oom_control.oom_kill = _oom_kills(memory.stats, oom_kills)
    out.blkio.SetInParent()
    for name in v1.BlkIOStat.DESCRIPTOR.fields_by_name:  # the guest's fields have the same names
        for entry in getattr(group.blkio_stats, name):
            getattr(out.blkio, name).add(op=entry.op, major=entry.major, minor=entry.minor, value=entry.value)
    for size, huge in sorted(group.hugetlb_stats.items()):
        out.hugetlb.add(pagesize=size, usage=huge.usage, max=huge.max_usage, failcnt=huge.failcnt)
    for interface in stats.network_stats:
        out.network.add(
            **{name: getattr(interface, name) for name in v1.NetworkStat.DESCRIPTOR.fields_by_name}
        )
    return out


def metrics_v2(stats: StatsContainerResponse, oom_kills: int = 0) -> v2.Metrics:
    """Return the counters in the form of cgroup v2, whose times are microseconds; the guest's are nano."""
    group = stats.cgroup_stats
    out = v2.Metrics()
    out.pids.SetInParent()
    out.pids.current, out.pids.limit = group.pids_stats.current, group.pids_stats.limit
    usage, throttling = group.cpu_stats.cpu_usage, group.cpu_stats.throttling_data
    out.cpu.SetInParent()
    out.cpu.usage_usec = usage.total_usage // 1000
    out.cpu.user_usec = usage.usage_in_usermode // 1000
    out.cpu.system_usec = usage.usage_in_kernelmode // 1000
    out.cpu.nr_periods, out.cpu.nr_throttled = throttling.periods, throttling.throttled_periods
    out.cpu.throttled_usec = throttling.throttled_time // 1000
    memory = group.memory_stats
    out.memory.SetInParent()
    for field, names in V2_MEMORY.items():
        setattr(out.memory, field, _first(memory.stats, names))
    for field in V2_ONLY & memory.stats.keys():
        setattr(out.memory, field, memory.stats[field])
    out.memory.usage, out.memory.usage_limit = memory.usage.usage, memory.usage.limit
    out.memory.max_usage = memory.usage.max_usage
    out.memory.swap_usage, out.memory.swap_limit = memory.swap_usage.usage, memory.swap_usage.limit
    out.memory.swap_max_usage = memory.swap_usage.max_usage
    out.memory_events.oom_kill = _oom_kills(memory.stats, oom_kills)
    _fill_io(out.io, stats)
    for size, huge in sorted(group.hugetlb_stats.items()):
        out.hugetlb.add(pagesize=size, current=huge.usage, max=huge.max_usage, failcnt=huge.failcnt)
    for interface in stats.network_stats:
        out.network.add(
            **{name: getattr(interface, name) for name in v1.NetworkStat.DESCRIPTOR.fields_by_name}
        )
    return out


def _first(stats: Mapping[str, int], names: tuple[str, ...]) -> int:
    return next((stats[name] for name in names if name in stats), 0)


def _oom_kills(stats: Mapping[str, int], told: int) -> int:
    """Return how often the guest's kernel killed for memory; at least as often as clients were told."""
    return max(stats.get("oom_kill", 0), told)


def _fill_entry(entry: v1.MemoryEntry, data: MemoryData) -> None:
    entry.SetInParent()
    entry.usage, entry.max, entry.failcnt, entry.limit = data.usage, data.max_usage, data.failcnt, data.limit


def _fill_io(out: v2.IOStat, stats: StatsContainerResponse) -> None:
    """Turn the guest's entries, one for each device and direction, into one for each device."""
    out.SetInParent()
    fields = {
        ("io_service_bytes_recursive", "read"): "rbytes",
        ("io_service_bytes_recursive", "write"): "wbytes",
        ("io_serviced_recursive", "read"): "rios",
        ("io_serviced_recursive", "write"): "wios",
    }
    devices: dict[tuple[int, int], dict[str, int]] = {}
    for (source, direction), field in fields.items():
        for entry in getattr(stats.cgroup_stats.blkio_stats, source):
            if entry.op.lower() == direction:
                devices.setdefault((entry.major, entry.minor), {})[field] = entry.value
    for (major, minor), counts in sorted(devices.items()):
        out.usage.add(major=major, minor=minor, **counts)
