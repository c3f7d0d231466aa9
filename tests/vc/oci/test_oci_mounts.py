"""The plan of mounts: one case for each row of what a spec can ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vc.errors import InvalidArgument, Unsupported
from vc.oci.mounts import (
    DEFAULT_SHM_BYTES,
    FileKind,
    HostFile,
    Mount,
    Plan,
    plan_mounts,
    read_mounts,
    shm_bytes,
    shm_flags,
    source_of,
    tmpfs_bytes,
)
from vc.oci.translate import check_workload

DATA = Path(__file__).parents[2] / "data" / "oci"
PODS = "/var/lib/kubelet/pods/uid/volumes"

HOST: Mapping[str, HostFile] = {
    "/srv/data": HostFile(FileKind.DIRECTORY, "ext4"),
    "/etc/hosts": HostFile(FileKind.FILE, "ext4"),
    "/run/app.sock": HostFile(FileKind.SOCKET, "tmpfs"),
    "/run/app.fifo": HostFile(FileKind.FIFO, "tmpfs"),
    "/srv/char": HostFile(FileKind.CHARACTER, "ext4"),
    "/srv/block": HostFile(FileKind.BLOCK, "ext4"),
    "/dev": HostFile(FileKind.DIRECTORY, "devtmpfs"),
    "/dev/null": HostFile(FileKind.CHARACTER, "devtmpfs"),
    "/dev/sdb": HostFile(FileKind.BLOCK, "devtmpfs"),
    "/dev/shm/file": HostFile(FileKind.FILE, "tmpfs"),
    "/device": HostFile(FileKind.DIRECTORY, "ext4"),
    "/run/pod/shm": HostFile(FileKind.DIRECTORY, "tmpfs", file_system_bytes=128 << 20),
    f"{PODS}/kubernetes.io~empty-dir/memory": HostFile(FileKind.DIRECTORY, "tmpfs", gid=1000),
    f"{PODS}/kubernetes.io~empty-dir/huge": HostFile(FileKind.DIRECTORY, "hugetlbfs", page_bytes=2 << 20),
    f"{PODS}/kubernetes.io~empty-dir/disk": HostFile(FileKind.DIRECTORY, "ext4"),
    f"{PODS}/kubernetes.io~empty-dir/memory/sub": HostFile(FileKind.DIRECTORY, "tmpfs"),
    f"{PODS}/kubernetes.io~secret/token": HostFile(FileKind.DIRECTORY, "tmpfs"),
}


def bind(source: str, destination: str = "/x", *options: str) -> dict[str, Any]:
    return {"destination": destination, "source": source, "type": "bind", "options": ["rbind", *options]}


def plan(*mounts: dict[str, Any]) -> list[Plan]:
    return [planned.plan for planned in plan_mounts({"mounts": list(mounts)}, HOST.get)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/srv/data", Plan.SHARE),
        ("/srv/../srv/./data", Plan.SHARE),
        ("/etc/hosts", Plan.SHARE),
        ("/run/app.sock", Plan.SHARE),
        ("/run/app.fifo", Plan.SHARE),
        ("/srv/char", Plan.IGNORE),
        ("/srv/block", Plan.BLOCK),
        ("/proc", Plan.GUEST),
        ("/proc/sys/net", Plan.GUEST),
        ("/sys/fs/cgroup", Plan.GUEST),
        ("/srv/../proc/1", Plan.GUEST),
        ("/dev", Plan.GUEST),
        ("/dev/null", Plan.GUEST),
        ("/dev/sdb", Plan.BLOCK),
        ("/dev/shm/file", Plan.SHARE),
        ("/device", Plan.SHARE),
        (f"{PODS}/kubernetes.io~empty-dir/memory", Plan.EPHEMERAL),
        (f"{PODS}/kubernetes.io~empty-dir/huge", Plan.EPHEMERAL),
        (f"{PODS}/kubernetes.io~empty-dir/disk", Plan.SHARE),
        (f"{PODS}/kubernetes.io~empty-dir/memory/sub", Plan.SHARE),
        (f"{PODS}/kubernetes.io~secret/token", Plan.SHARE),
    ],
)
def test_a_bind_is_planned_by_what_its_source_is(source: str, expected: Plan) -> None:
    assert plan(bind(source)) == [expected]


@pytest.mark.parametrize("source", ["/dev/sdb", f"{PODS}/kubernetes.io~empty-dir/memory"])
def test_a_volume_that_cannot_be_made_is_refused_before_there_is_a_sandbox(source: str) -> None:
    """It cost a boot before it was refused."""
    spec = {"process": {"args": ["true"], "cwd": "/"}, "mounts": [bind("/srv/data"), bind(source, "/x")]}
    with pytest.raises(Unsupported, match=f'"{source}" on "/x" needs a'):
        check_workload(spec, HOST.get)


@pytest.mark.parametrize("kind", ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"])
def test_file_systems_of_the_kernel_come_from_the_guest(kind: str) -> None:
    assert plan({"destination": "/x", "type": kind, "source": kind}) == [Plan.GUEST]


def test_a_file_system_on_a_disk_of_the_host_is_refused() -> None:
    with pytest.raises(
        Unsupported, match=re.escape('mounts[0] (/x): the ext4 file system on the host\'s "/dev/sdb"')
    ):
        plan({"destination": "/x", "type": "ext4", "source": "/dev/sdb"})


@pytest.mark.parametrize(
    ("mount", "flags"),
    [
        (Mount("/dev/shm", "shm", "tmpfs", ("noexec", "nodev", "mode=1777", "size=1m")), ("noexec", "nodev")),
        (Mount("/dev/shm", "shm", "tmpfs", ("ro",)), ("ro",)),
        (Mount("/dev/shm", "/run/shm", "bind", ("rbind", "rw")), ("noexec", "nosuid", "nodev")),
        (Mount("/dev/shm", "/run/shm", "bind", ("rbind", "ro")), ("noexec", "nosuid", "nodev", "ro")),
    ],
)
def test_a_container_sees_dev_shm_with_the_flags_that_its_spec_means(
    mount: Mount, flags: tuple[str, ...]
) -> None:
    assert shm_flags(mount) == flags


@pytest.mark.parametrize(
    ("options", "flat"), [(("bind",), True), (("rbind",), False), (("bind", "rbind"), False), ((), False)]
)
def test_only_a_bind_that_is_not_recursive_leaves_nested_mounts_out(
    options: tuple[str, ...], flat: bool
) -> None:
    assert Mount("/to", "/from", "bind", options).is_flat is flat


def test_dev_shm_is_the_sandboxs_unless_a_volume_is_mounted_there() -> None:
    assert plan(bind("/run/pod/shm", "/dev/shm")) == [Plan.SHM]
    assert plan({"destination": "/dev/shm/", "type": "tmpfs", "source": "shm"}) == [Plan.SHM]
    assert plan(bind(f"{PODS}/kubernetes.io~empty-dir/memory", "/dev/shm")) == [Plan.EPHEMERAL]


def test_a_bind_is_known_by_its_options_too() -> None:
    assert plan({"destination": "/x", "type": "none", "source": "/srv/data", "options": ["bind"]}) == [
        Plan.SHARE
    ]


def test_what_will_surprise_is_noted() -> None:
    planned = plan_mounts({"mounts": [bind("/run/app.sock"), bind("/srv/char"), bind("/srv/data")]}, HOST.get)
    assert [bool(item.note) for item in planned] == [True, True, False]
    assert "/run/app.sock" in planned[0].note


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        (bind("/nowhere"), 'mounts[0].source: "/nowhere" does not exist on the host'),
        (bind("relative"), 'mounts[0].source: got "relative" (a string), must be an absolute path'),
        (bind(""), 'mounts[0].source: got "" (a string), must be an absolute path'),
        ({"type": "tmpfs"}, "mounts[0].destination is missing"),
        ({"destination": 1}, "mounts[0].destination: got 1 (a number), must be a string"),
        ({"destination": "/a", "options": "ro"}, 'mounts[0].options: got "ro" (a string), must be an array'),
    ],
)
def test_mounts_that_make_no_sense_are_refused(mount: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match="^" + re.escape(message)):
        plan(mount)


@pytest.mark.parametrize(
    ("options", "readonly"),
    [((), False), (("ro",), True), (("ro", "rw"), False), (("rw", "rbind", "ro"), True), (("rro",), True)],
)
def test_the_last_word_about_writing_counts(options: tuple[str, ...], readonly: bool) -> None:
    assert Mount("/x", "/y", "bind", options).readonly is readonly


@pytest.mark.parametrize(
    ("given_path", "clean"), [("a/b", "/a/b"), ("//a//b/", "/a/b"), ("/../../a", "/a"), (".", "/")]
)
def test_destinations_become_absolute_and_clean(given_path: str, clean: str) -> None:
    assert read_mounts({"mounts": [{"destination": given_path}]})[0].destination == clean


@pytest.mark.parametrize(
    ("mounts", "size"),
    [
        ([], DEFAULT_SHM_BYTES),
        ([bind("/run/pod/shm", "/dev/shm")], 128 << 20),
        ([bind("/nowhere", "/dev/shm")], DEFAULT_SHM_BYTES),
        ([{"destination": "/dev/shm", "type": "tmpfs", "options": ["size=65536k"]}], 64 << 20),
        ([{"destination": "/dev/shm", "type": "tmpfs", "options": ["size=1g", "size=2G"]}], 2 << 30),
        ([{"destination": "/dev/shm", "type": "tmpfs", "options": ["size=50%"]}], DEFAULT_SHM_BYTES),
        ([{"destination": "/run", "type": "tmpfs", "options": ["size=1"]}], DEFAULT_SHM_BYTES),
    ],
)
def test_the_size_of_dev_shm(mounts: list[dict[str, Any]], size: int) -> None:
    assert shm_bytes({"mounts": mounts}, HOST.get) == size


def test_tmpfs_sizes_in_bytes() -> None:
    assert tmpfs_bytes(["mode=755", "size=4096"]) == 4096
    assert tmpfs_bytes(["size=1e9"]) == 0


def test_the_source_of_resolv_conf_is_the_last_bind() -> None:
    spec = {
        "mounts": [bind("/a", "/etc/resolv.conf"), bind("/b", "/etc/resolv.conf"), bind("/c", "/etc/hosts")]
    }
    assert source_of(spec, "/etc/resolv.conf") == "/b"
    assert source_of(spec, "/etc/nothing") is None


@pytest.mark.parametrize("name", ["containerd-default.json", "runc-default.json", "crun-default.json"])
def test_the_default_specs_need_no_host_at_all(name: str) -> None:
    spec = json.loads((DATA / name).read_bytes())
    assert {planned.plan for planned in plan_mounts(spec, lambda path: None)} <= {Plan.GUEST, Plan.SHM}


FACTS = st.builds(HostFile, st.sampled_from(FileKind), st.sampled_from(["ext4", "tmpfs", "hugetlbfs"]))
ENTRIES = st.fixed_dictionaries(
    {"destination": st.text(min_size=1)},
    optional={
        "source": st.text() | st.sampled_from(sorted(HOST)),
        "type": st.sampled_from(["bind", "tmpfs", "proc", "ext4", ""]),
        "options": st.lists(st.sampled_from(["bind", "rbind", "ro", "rw"])),
    },
)


@given(st.lists(ENTRIES, max_size=3), st.none() | FACTS)
def test_each_mount_gets_one_plan_in_order_or_a_clean_refusal(
    mounts: list[dict[str, Any]], facts: HostFile | None
) -> None:
    try:
        planned = plan_mounts({"mounts": mounts}, lambda path: facts)
    except (InvalidArgument, Unsupported):
        return
    assert [item.mount for item in planned] == read_mounts({"mounts": mounts})
    for item in planned:
        if item.plan in (Plan.SHARE, Plan.BLOCK, Plan.EPHEMERAL):
            assert item.host is not None
