"""What the guest measures about itself and the agent, in Prometheus' text format and under Kata's names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE_SIZE = 4096
TICKS = 100  # USER_HZ

Labels = tuple[tuple[str, str], ...]
Sample = tuple[Labels, float]

# The fields of a line of /proc/stat: proc(5)
CPU_FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")


def collect() -> str:
    """Return everything as text."""
    return format_metrics(_metrics())


def format_metrics(metrics: Iterable[tuple[str, str, Iterable[Sample]]]) -> str:
    """Format metrics: each a name, a help text and samples; all of them are gauges."""
    lines = []
    for name, text, samples in metrics:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
        for labels, value in samples:
            shown = ",".join(f'{key}="{item}"' for key, item in labels)
            lines.append(f"{name}{{{shown}}} {value:g}" if shown else f"{name} {value:g}")
    return "\n".join(lines) + "\n"


def _metrics() -> Iterator[tuple[str, str, Iterable[Sample]]]:
    for name, value in agent_numbers(_read("/proc/self/stat")):
        yield f"kata_agent_{name}", f"Agent process, {name}", [((), value)]
    count = len(os.listdir("/proc/self/fd"))
    yield "kata_agent_process_open_fds", "Agent process, open descriptors", [((), count)]
    load = zip(("load1", "load5", "load15"), _read("/proc/loadavg").split(), strict=False)
    yield "kata_guest_load", "Guest system load", _named(load)
    yield "kata_guest_cpu_time", "Guest CPU statistics in ticks", cpu_times(_read("/proc/stat"))
    yield "kata_guest_meminfo", "Guest memory in kB", meminfo(_read("/proc/meminfo"))
    yield "kata_guest_netdev_stat", "Guest network devices", netdev(_read("/proc/net/dev"))


def agent_numbers(text: str) -> list[tuple[str, float]]:
    """Parse /proc/PID/stat, whose second field may hold anything in parentheses: seconds, count, bytes,
    bytes.
    """
    fields = text.rpartition(")")[2].split()
    if len(fields) < 22:
        return []
    user, system, threads, virtual, resident = (int(fields[index]) for index in (11, 12, 17, 20, 21))
    return [
        ("total_time", (user + system) / TICKS),
        ("threads", threads),
        ("total_vm", virtual),
        ("total_rss", resident * PAGE_SIZE),
    ]


def _named(pairs: Iterable[tuple[str, str]]) -> list[Sample]:
    return [((("item", name),), float(value)) for name, value in pairs]


def cpu_times(text: str) -> list[Sample]:
    """Parse /proc/stat: one sample for each processor and kind of time."""
    result: list[Sample] = []
    for line in text.splitlines():
        name, *values = line.split()
        if name.startswith("cpu"):
            cpu = name.removeprefix("cpu") or "total"
            result += [
                ((("cpu", cpu), ("item", item)), float(value))
                for item, value in zip(CPU_FIELDS, values, strict=False)
            ]
    return result


def meminfo(text: str) -> list[Sample]:
    """Parse /proc/meminfo."""
    return [
        ((("item", name.lower()),), float(rest.split()[0]))
        for name, separator, rest in (line.partition(":") for line in text.splitlines())
        if separator and rest.split()
    ]


def netdev(text: str) -> list[Sample]:
    """Parse /proc/net/dev: eight counters received, eight sent."""
    kinds = ("bytes", "packets", "errs", "drop", "fifo")
    result: list[Sample] = []
    for line in text.splitlines()[2:]:
        name, _, rest = line.partition(":")
        values = rest.split()
        for way, offset in (("recv", 0), ("sent", 8)):
            result += [
                ((("interface", name.strip()), ("item", f"{way}_{kind}")), float(values[offset + index]))
                for index, kind in enumerate(kinds)
            ]
    return result


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
