"""What the agent reads from the kernel: command line, mounts, cgroups, events, addresses of devices."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent import cgroups, devices, guest, log, metrics, mounts, stats, storage, uevents
from agent.errors import InvalidArgument, NotFound
from protos.kata import oci_pb2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quiet agent.log=debug\n", {"quiet": "", "agent.log": "debug"}),
        ("a=1 a=2", {"a": "2"}),
        ('x="two words" y=b', {"x": "two words", "y": "b"}),
        ("", {}),
        ("  many   blanks  ", {"many": "", "blanks": ""}),
        ("root=UUID=1-2", {"root": "UUID=1-2"}),
    ],
)
def test_the_kernel_command_line(text: str, expected: dict[str, str]) -> None:
    assert guest.parse_command_line(text) == expected


def test_a_parameter_that_is_no_number_leaves_the_default() -> None:
    assert guest.number({"a": "7"}, "a", 3) == 7
    assert guest.number({"a": "x"}, "a", 3) == 3
    assert guest.number({}, "a", 3) == 3


@pytest.mark.parametrize(
    ("options", "flags", "propagation", "data"),
    [
        (["nosuid", "nodev", "size=64k"], 2 | 4, 0, "size=64k"),
        (["ro", "rw"], 0, 0, ""),
        (["rbind", "rprivate", "ro"], 4096 | 16384 | 1, (1 << 18) | 16384, ""),
        (["defaults", "mode=755", "", "gid=5"], 0, 0, "mode=755,gid=5"),
    ],
)
def test_mount_options(options: list[str], flags: int, propagation: int, data: str) -> None:
    parsed = mounts.parse_options(options)
    assert (parsed.flags, parsed.propagation, parsed.data) == (flags, propagation, data)


def test_mountinfo_with_blanks_and_optional_fields() -> None:
    text = (
        "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue\n"
        "37 35 0:5 / /with\\040blank rw - tmpfs a\\134b rw\n"
    )
    entries = mounts.parse_mountinfo(text)
    assert [(e.target, e.fstype, e.source) for e in entries] == [
        ("/mnt2", "ext3", "/dev/root"),
        ("/with blank", "tmpfs", "a\\b"),
    ]


def test_asking_whether_an_entry_is_removed_makes_nothing(tmp_path: Path) -> None:
    directory, file, removed = tmp_path / "directory", tmp_path / "file", tmp_path / "removed"
    directory.mkdir()
    file.touch()
    assert [mounts.is_removed(str(path)) for path in (directory, file, removed)] == [False, False, True]
    assert {*tmp_path.iterdir()} == {directory, file}


def test_a_kernel_event() -> None:
    message = (
        b"add@/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb\0ACTION=add\0SUBSYSTEM=block\0DEVNAME=vdb\0"
    )
    assert uevents.parse(message) == {
        "ACTION": "add",
        "DEVPATH": "/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb",
        "SUBSYSTEM": "block",
        "DEVNAME": "vdb",
    }
    assert uevents.parse(b"libudev\0\xfe\xed") == {}


def test_waiting_ends_with_what_was_looked_for() -> None:
    assert uevents.wait_for(lambda: "here", "a thing") == "here"
    with pytest.raises(NotFound, match="a thing has not appeared"):
        uevents.wait_for(lambda: None, "a thing", timeout=0)


@pytest.mark.parametrize(
    ("text", "slots"), [("02/01", [(2, 0), (1, 0)]), ("1f", [(31, 0)]), ("03.1", [(3, 1)])]
)
def test_pci_paths(text: str, slots: list[tuple[int, int]]) -> None:
    assert devices.parse_pci_path(text) == slots


@pytest.mark.parametrize("text", ["", "2", "20", "zz", "02/", "02//01", "02.8", "../02"])
def test_what_is_no_pci_path(text: str) -> None:
    with pytest.raises(InvalidArgument, match="no PCI path"):
        devices.parse_pci_path(text)


def test_a_pci_path_leads_through_bridges(tmp_path: Path) -> None:
    bridge = tmp_path / "devices/pci0000:00/0000:00:02.0"
    (bridge / "pci_bus/0000:01").mkdir(parents=True)
    assert devices.pci_sysfs_path("02/01", str(tmp_path)) == f"{bridge}/0000:01:01.0"
    with pytest.raises(NotFound, match="no bridge"):
        devices.pci_sysfs_path("03/01", str(tmp_path))


def test_numbers_of_the_guest_replace_those_of_the_host() -> None:
    spec = oci_pb2.Spec(
        Linux=oci_pb2.Linux(
            Devices=[oci_pb2.LinuxDevice(Path="/dev/data", Type="b", Major=8, Minor=16)],
            Resources=oci_pb2.LinuxResources(
                Devices=[oci_pb2.LinuxDeviceCgroup(Allow=True, Type="b", Major=8, Minor=16, Access="rw")]
            ),
        )
    )
    devices.rewrite(spec, {"/dev/data": (254, 3)})
    assert (spec.Linux.Devices[0].Major, spec.Linux.Devices[0].Minor) == (254, 3)
    rule = spec.Linux.Resources.Devices[0]
    assert (rule.Major, rule.Minor) == (254, 3)
    with pytest.raises(InvalidArgument, match="not in the spec"):
        devices.rewrite(spec, {"/dev/other": (1, 1)})


def test_where_the_cgroup_of_a_process_is() -> None:
    v1 = "9:name=systemd:/c2\n4:memory:/c2\n2:cpuacct,cpu:/c2\n0::/\n"
    assert cgroups.locate(v1, v2_root=False) == {
        "memory": "/sys/fs/cgroup/memory/c2",
        "cpuacct": "/sys/fs/cgroup/cpuacct/c2",
        "cpu": "/sys/fs/cgroup/cpu/c2",
    }
    assert cgroups.locate("0::/kata/c2\n", v2_root=True) == {"": "/sys/fs/cgroup/kata/c2"}
    assert cgroups.locate("0::/\n", v2_root=True) == {}


V2 = {
    "cpu.stat": (
        "usage_usec 300\nuser_usec 200\nsystem_usec 100\nnr_periods 3\nnr_throttled 2\nthrottled_usec 1\n"
    ),
    "memory.stat": "anon 10\nfile 20\nkernel 30\n",
    "memory.current": "4096\n",
    "memory.peak": "8192\n",
    "memory.max": "max\n",
    "memory.events": "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n",
    "pids.current": "3\n",
    "pids.max": "max\n",
    "io.stat": "254:0 rbytes=100 wbytes=200 rios=3 wios=4 dbytes=0 dios=0\n",
    "hugetlb.2MB.current": "2097152\n",
    "hugetlb.2MB.max": "max\n",
}


def test_statistics_of_version_2() -> None:
    result = stats.version2(lambda _, name: V2.get(name, ""))
    usage = result.cpu_stats.cpu_usage
    assert (usage.total_usage, usage.usage_in_usermode, usage.usage_in_kernelmode) == (300000, 200000, 100000)
    assert result.cpu_stats.throttling_data.throttled_time == 1000
    memory = result.memory_stats
    assert (memory.cache, memory.usage.usage, memory.usage.max_usage) == (20, 4096, 8192)
    assert (memory.usage.limit, memory.usage.failcnt) == (2**64 - 1, 7)
    assert dict(memory.stats) == {"anon": 10, "file": 20, "kernel": 30, "oom_kill": 1}
    assert (result.pids_stats.current, result.pids_stats.limit) == (3, 0)
    entries = result.blkio_stats.io_service_bytes_recursive
    assert [(e.major, e.minor, e.op, e.value) for e in entries] == [
        (254, 0, "read", 100),
        (254, 0, "write", 200),
    ]
    assert result.hugetlb_stats["2MB"].usage == 2097152


def test_statistics_of_version_1() -> None:
    files = {
        "cpuacct.usage": "5000\n",
        "cpuacct.stat": "user 2\nsystem 3\n",
        "cpuacct.usage_percpu": "2000 3000 \n",
        "memory.limit_in_bytes": "9223372036854771712\n",
        "memory.usage_in_bytes": "77\n",
        "pids.max": "9\n",
        "blkio.throttle.io_service_bytes_recursive": "8:0 Read 5\n8:0 Write 6\nTotal 11\n",
    }
    result = stats.version1(lambda _, name: files.get(name, ""))
    usage = result.cpu_stats.cpu_usage
    assert (usage.total_usage, list(usage.percpu_usage)) == (5000, [2000, 3000])
    assert (usage.usage_in_usermode, usage.usage_in_kernelmode) == (20_000_000, 30_000_000)
    assert (result.memory_stats.usage.limit, result.memory_stats.usage.usage) == (2**64 - 1, 77)
    assert result.pids_stats.limit == 9
    assert [e.op for e in result.blkio_stats.io_service_bytes_recursive] == ["read", "write"]


def test_statistics_of_a_cgroup_that_has_gone_are_zero() -> None:
    assert stats.version2(lambda *_: "").memory_stats.usage.usage == 0
    assert stats.version1(lambda *_: "").memory_stats.usage.usage == 0


def test_the_group_option_is_taken_out_of_a_storage() -> None:
    assert storage.split_group(["size=1", "fsgid=7"]) == (7, ["size=1"])
    assert storage.split_group(["size=1"]) == (None, ["size=1"])
    with pytest.raises(InvalidArgument, match="no number"):
        storage.split_group(["fsgid=x"])


@pytest.mark.parametrize(
    ("value", "shown"),
    [("plain", "plain"), ("two words", '"two words"'), ('"', '"\\""'), ("", '""'), ("a\nb", '"a\\nb"')],
)
def test_log_values_stay_on_one_line(value: str, shown: str) -> None:
    assert log.format_value(value) == shown


def test_metrics_of_processors_memory_and_network() -> None:
    assert metrics.cpu_times("cpu  1 2 3\ncpu0 4 5 6\nintr 7\n")[3] == ((("cpu", "0"), ("item", "user")), 4.0)
    assert metrics.meminfo("MemTotal:  10 kB\n") == [((("item", "memtotal"),), 10.0)]
    heads = "Inter-|   Receive\n face |bytes\n"
    line = "  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n"
    sent = ((("interface", "eth0"), ("item", "sent_bytes")), 9.0)
    assert sent in metrics.netdev(heads + line)
    text = metrics.format_metrics([("m", "help", [((("a", "b"),), 2.0)])])
    assert text == '# HELP m help\n# TYPE m gauge\nm{a="b"} 2\n'


def test_numbers_of_a_process_whose_name_has_blanks() -> None:
    with open("/proc/self/stat", encoding="utf-8") as file:
        fields = file.read().rpartition(")")[2]
    numbers = dict(metrics.agent_numbers(f"1 (a) b) {fields.strip()}"))
    assert numbers["threads"] >= 1
    assert numbers["total_rss"] < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
