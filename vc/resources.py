"""Arithmetic of vCPUs and memory: pure. A share of CPU time is a float, a number of vCPUs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from vc.errors import InvalidArgument

MIB: Final = 1 << 20
SHARES_PER_CPU: Final = 1024  # cgroup v1 cpu.shares of one CPU; runtime-spec config-linux.md, "CPU"

# containerd internal/cri/annotations: the pod's size, if the kubelet told it.
POD_QUOTA: Final = "io.kubernetes.cri.sandbox-cpu-quota"
POD_PERIOD: Final = "io.kubernetes.cri.sandbox-cpu-period"
POD_SHARES: Final = "io.kubernetes.cri.sandbox-cpu-shares"
POD_MEMORY: Final = "io.kubernetes.cri.sandbox-memory"


@dataclass(frozen=True, slots=True)
class Size:
    """What a workload needs, or what a VM has. 0 is "no limit given"."""

    vcpus: float = 0.0
    memory_mib: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.vcpus + other.vcpus, self.memory_mib + other.memory_mib)


def cpu_limit(quota_us: int, period_us: int, shares: int = 0) -> float:
    """Return the CPUs that quota and period allow; without a quota, whole CPUs for the shares, if any."""
    if quota_us > 0 and period_us > 0:
        return quota_us / period_us
    return float(ceil(shares / SHARES_PER_CPU)) if shares > 0 else 0.0


def memory_limit(limit_bytes: int, hugepage_bytes: int = 0) -> int:
    """Return the MiB of a memory limit, rounded up; a limit of 0 or less is none."""
    return ceil((max(limit_bytes, 0) + max(hugepage_bytes, 0)) / MIB)


def container_size(resources: Mapping[str, Any]) -> Size:
    """Return what the resources of a checked OCI spec ask for."""
    cpu = resources.get("cpu") or {}
    memory = resources.get("memory") or {}
    huge = sum(limit.get("limit", 0) for limit in resources.get("hugepageLimits") or ())
    return Size(
        cpu_limit(cpu.get("quota") or 0, cpu.get("period") or 0),
        memory_limit(memory.get("limit") or 0, huge),
    )


def pod_size(annotations: Mapping[str, str]) -> Size:
    """Return what the kubelet says that the whole pod needs. Raises: InvalidArgument."""
    quota, period, shares, memory = (
        _decimal(annotations, key) for key in (POD_QUOTA, POD_PERIOD, POD_SHARES, POD_MEMORY)
    )
    return Size(cpu_limit(quota, period, shares), memory_limit(memory))


def _decimal(annotations: Mapping[str, str], key: str) -> int:
    text = annotations.get(key, "0")
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise InvalidArgument(f'annotation {key}: got "{text[:40]}", must be a decimal number')
    return int(text)


def static_size(default: Size, workload: Size) -> Size:
    """Return the VM's size when nothing is plugged later: the default plus the workload, in whole vCPUs."""
    return Size(float(max(1, ceil(default.vcpus + workload.vcpus))), default.memory_mib + workload.memory_mib)


def running_size(default: Size, live: Iterable[Size], max_vcpus: int, cpuset_size: int = 0) -> Size:
    """Return the VM's size for the containers that live now.

    `cpuset_size` counts the CPUs of all their cpusets together; it decides when no container has a quota.
    """
    workload = sum(live, Size())
    vcpus = workload.vcpus or float(cpuset_size)
    return Size(
        float(min(max(1, ceil(default.vcpus + vcpus)), max_vcpus)), default.memory_mib + workload.memory_mib
    )
