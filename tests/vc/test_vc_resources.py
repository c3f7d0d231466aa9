"""vCPU and memory arithmetic."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vc.errors import InvalidArgument
from vc.resources import (
    POD_MEMORY,
    POD_PERIOD,
    POD_QUOTA,
    POD_SHARES,
    Size,
    container_size,
    cpu_limit,
    memory_limit,
    pod_size,
    running_size,
    static_size,
)


@pytest.mark.parametrize(
    ("quota", "period", "shares", "cpus"),
    [
        (150000, 100000, 0, 1.5),
        (150000, 100000, 4096, 1.5),
        (-1, 100000, 0, 0.0),
        (0, 100000, 2048, 2.0),
        (0, 0, 1025, 2.0),
        (5, 0, 2, 1.0),
        (0, 0, 0, 0.0),
    ],
)
def test_cpus_of_quota_period_and_shares(quota: int, period: int, shares: int, cpus: float) -> None:
    assert cpu_limit(quota, period, shares) == cpus


@pytest.mark.parametrize(
    ("limit", "huge", "mib"), [(0, 0, 0), (-1, 0, 0), (1, 0, 1), (1 << 20, 0, 1), ((1 << 20) + 1, 2 << 20, 4)]
)
def test_memory_is_rounded_up_to_mib(limit: int, huge: int, mib: int) -> None:
    assert memory_limit(limit, huge) == mib


def test_a_containers_size_is_read_from_its_resources() -> None:
    resources = {
        "cpu": {"quota": 50000, "period": 100000, "shares": 99999},
        "memory": {"limit": 512 << 20},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 64 << 20}],
    }
    assert container_size(resources) == Size(0.5, 576)
    assert container_size({}) == Size()


def test_a_pods_size_is_read_from_its_annotations() -> None:
    annotations = {POD_QUOTA: "250000", POD_PERIOD: "100000", POD_SHARES: "1024", POD_MEMORY: "1073741824"}
    assert pod_size(annotations) == Size(2.5, 1024)
    assert pod_size({POD_QUOTA: "-1", POD_SHARES: "1536"}) == Size(2.0, 0)
    assert pod_size({}) == Size()


@pytest.mark.parametrize("text", ["", "1.5", "1e3", "²", "9" * 20, "--1", "x"])
def test_a_pod_size_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(POD_MEMORY)):
        pod_size({POD_MEMORY: text})


@pytest.mark.parametrize(
    ("default", "workload", "size"),
    [
        (Size(1.0, 2048), Size(), Size(1.0, 2048)),
        (Size(1.0, 2048), Size(1.5, 512), Size(3.0, 2560)),
        (Size(0.0, 256), Size(), Size(1.0, 256)),
    ],
)
def test_a_static_vm_has_the_default_and_the_workload(default: Size, workload: Size, size: Size) -> None:
    assert static_size(default, workload) == size


def test_a_running_vm_grows_with_its_containers_up_to_its_maximum() -> None:
    default = Size(1.0, 1024)
    assert running_size(default, [Size(0.5, 128), Size(0.6, 0)], 8) == Size(3.0, 1152)
    assert running_size(default, [Size(100.0, 1)], 8) == Size(8.0, 1025)
    assert running_size(default, [Size()], 8, cpuset_size=4) == Size(5.0, 1024)
    assert running_size(default, [Size(0.5, 0)], 8, cpuset_size=4) == Size(2.0, 1024)


SIZES = st.builds(Size, st.floats(0, 100), st.integers(0, 10**6))


@given(SIZES, st.lists(SIZES, max_size=5), st.integers(1, 64), SIZES)
def test_one_more_container_never_shrinks_the_vm(
    default: Size, live: list[Size], top: int, more: Size
) -> None:
    before, after = running_size(default, live, top), running_size(default, [*live, more], top)
    assert 1 <= before.vcpus <= after.vcpus <= top
    assert before.memory_mib <= after.memory_mib
