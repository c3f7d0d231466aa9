"""The guest's spec: every field arrives, and what belongs to the host does not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st

from protos.kata import oci_pb2
from vc.errors import InvalidArgument
from vc.oci.mounts import Mount
from vc.oci.spec import parse_spec
from vc.oci.translate import GuestSpec, guest_process, guest_resources, guest_spec
from vc.oci.wire import fill

DATA = Path(__file__).parents[2] / "data" / "oci"


def everything() -> dict[str, Any]:
    return parse_spec((DATA / "everything.json").read_bytes())


def small(**linux: Any) -> dict[str, Any]:
    return {"process": {"args": ["true"], "cwd": "/"}, "root": {"path": "rootfs"}, "linux": linux}


def translated(spec: dict[str, Any], *, seccomp: bool = True) -> GuestSpec:
    return guest_spec(spec, root_path="/guest/rootfs", mounts=[], seccomp=seccomp)


def filled(spec: dict[str, Any]) -> oci_pb2.Spec:
    message = oci_pb2.Spec()
    notes: list[str] = []
    fill(message, spec, "spec", notes)
    assert notes == []
    return message


def paths(descriptor: Descriptor, prefix: str = "") -> Iterator[str]:
    for field in descriptor.fields:
        yield prefix + field.name
        kind = field.message_type
        if kind is not None and not kind.GetOptions().map_entry:
            yield from paths(kind, f"{prefix}{field.name}.")


def set_paths(message: Any, prefix: str = "") -> Iterator[str]:
    for field, value in message.ListFields():
        yield prefix + field.name
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for item in value if field.is_repeated else [value]:
                yield from set_paths(item, f"{prefix}{field.name}.")


def test_every_field_of_the_api_is_filled_from_json() -> None:
    wanted = set(paths(oci_pb2.Spec.DESCRIPTOR))
    hooks = {
        path for path in wanted if re.match(r"Hooks\.(?!Prestart)\w+\.", path)
    }  # one hook in full is enough
    other = {"Solaris", "Solaris.dummy", "Windows", "Windows.dummy"}
    assert wanted - hooks - other <= set(set_paths(filled(everything())))


def test_values_arrive_unchanged_up_to_the_limits_of_their_types() -> None:
    message = filled(everything())
    assert message.Version == "1.1.0"
    assert message.Process.User.AdditionalGids == [3, 4294967295]
    assert message.Process.Rlimits[0].Hard == 2**64 - 1
    assert message.Process.OOMScoreAdj == -999
    assert message.Process.Args == ["sh", "-c", "echo ☃"]
    assert message.Linux.Resources.Memory.Swap == -1
    assert message.Linux.Seccomp.Syscalls[0].errnoret == 38
    assert message.Linux.Seccomp.Syscalls[0].Args[0].ValueTwo == 1
    assert dict(message.Annotations) == {"io.kubernetes.cri.container-type": "sandbox", "a b": ""}


@pytest.mark.parametrize("name", ["containerd-default.json", "runc-default.json", "crun-default.json"])
def test_the_default_specs_of_runtimes_translate(name: str) -> None:
    spec = parse_spec((DATA / name).read_bytes())
    spec["process"].setdefault("args", ["sh"])  # `ctr oci spec` prints none: it comes from the image
    guest = translated(spec)
    assert [entry.Type for entry in guest.spec.Linux.Namespaces] == [
        entry["type"]
        for entry in spec["linux"]["namespaces"]
        if entry["type"] in ("ipc", "uts", "mount", "user")
    ]
    assert guest.spec.Linux.MaskedPaths == spec["linux"]["maskedPaths"]
    assert guest.spec.Process.Capabilities.Bounding == spec["process"]["capabilities"]["bounding"]
    assert guest.spec.Root.Path == "/guest/rootfs"


def test_what_names_the_host_is_taken_away() -> None:
    guest = translated(everything())
    linux = guest.spec.Linux
    assert not guest.spec.HasField("Hooks")
    assert (guest.spec.Process.SelinuxLabel, guest.spec.Process.ApparmorProfile, linux.MountLabel) == (
        "",
        "",
        "",
    )
    assert not linux.HasField("IntelRdt")
    assert not linux.Resources.HasField("BlockIO")
    assert not linux.Resources.HasField("Network")
    assert (linux.Resources.CPU.Cpus, linux.Resources.CPU.Mems) == ("", "")
    assert any("hooks" in note for note in guest.notes)
    assert any("blockIO" in note for note in guest.notes)


def test_what_the_guest_can_enforce_stays() -> None:
    spec = everything()
    linux = translated(spec).spec.Linux
    assert linux.Resources.Memory.Limit == 536870912
    assert (linux.Resources.CPU.Quota, linux.Resources.CPU.Period, linux.Resources.CPU.Shares) == (
        150000,
        100000,
        1024,
    )
    assert linux.Resources.Pids.Limit == 1000
    assert linux.CgroupsPath == "/pods/one"
    assert dict(linux.Sysctl) == {"net.ipv4.ip_forward": "1"}
    assert linux.UIDMappings[0].HostID == 100000
    assert linux.Seccomp.DefaultAction == "SCMP_ACT_ERRNO"
    assert [device.Path for device in linux.Devices] == ["/dev/fuse"]


def test_seccomp_goes_when_the_configuration_disables_it_and_the_log_is_told() -> None:
    guest = translated(everything(), seccomp=False)
    assert not guest.spec.Linux.HasField("Seccomp")
    assert any("seccomp" in note for note in guest.notes)


@pytest.mark.parametrize(
    ("entries", "shared"),
    [([{"type": "pid"}], False), ([{"type": "pid", "path": "/proc/1/ns/pid"}], True), ([], False)],
)
def test_a_pid_namespace_with_a_path_means_that_the_pod_shares_its_own(
    entries: list[dict[str, str]], shared: bool
) -> None:
    guest = translated(small(namespaces=entries))
    assert guest.sandbox_pidns is shared
    assert not guest.spec.Linux.Namespaces


def test_kept_namespaces_lose_their_paths_and_the_machines_own_are_dropped() -> None:
    kinds = ("network", "ipc", "uts", "mount", "cgroup", "time")
    guest = translated(small(namespaces=[{"type": kind, "path": f"/run/ns/{kind}"} for kind in kinds]))
    assert [(entry.Type, entry.Path) for entry in guest.spec.Linux.Namespaces] == [
        ("ipc", ""),
        ("uts", ""),
        ("mount", ""),
    ]


def test_a_user_namespace_stays_only_if_it_can_be_made_anew() -> None:
    mappings = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    user = [{"type": "user"}]
    kept = translated(small(namespaces=user, uidMappings=mappings, gidMappings=mappings))
    assert [entry.Type for entry in kept.spec.Linux.Namespaces] == ["user"]
    lost = translated(small(namespaces=[{"type": "user", "path": "/proc/9/ns/user"}]))
    assert not lost.spec.Linux.Namespaces
    assert any("user namespace" in note for note in lost.notes)


def test_device_rules_with_the_hosts_numbers_do_not_open_devices_of_the_guest() -> None:
    rules = [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "access": "m"},
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        {"allow": True, "type": "c", "major": 136, "access": "rwm"},
        {"allow": True, "type": "b", "major": 254, "minor": 0, "access": "rwm"},
        {"allow": True, "type": "b", "major": 1, "minor": 0, "access": "rwm"},
        {"allow": True, "type": "c", "major": 10, "minor": 232, "access": "rwm"},
        {"allow": False, "type": "b", "major": 8, "minor": 0, "access": "rwm"},
    ]
    kept = translated(small(resources={"devices": rules})).spec.Linux.Resources.Devices
    assert [(rule.Allow, rule.Type, rule.Major, rule.Minor) for rule in kept] == [
        (False, "", -1, -1),
        (True, "c", -1, -1),
        (True, "c", 1, 3),
        (True, "c", 136, -1),
        (False, "b", 8, 0),
    ]


def test_device_nodes_of_the_host_are_left_out_and_named() -> None:
    devices = [
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
        {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200},
        {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
        {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232},
    ]
    guest = translated(small(devices=devices))
    assert [device.Path for device in guest.spec.Linux.Devices] == ["/dev/net/tun"]
    assert [note for note in guest.notes if "/dev/" in note] == [
        "2 device nodes are the host's and left out: /dev/sda (b 8:0), /dev/kvm (c 10:232)",
    ]


def test_a_hugepage_limit_of_zero_is_left_out() -> None:
    limits = [{"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": 4194304}]
    kept = translated(small(resources={"hugepageLimits": limits})).spec.Linux.Resources.HugepageLimits
    assert [(limit.Pagesize, limit.Limit) for limit in kept] == [("2MB", 4194304)]


def test_resources_are_there_even_if_the_spec_has_none() -> None:
    spec = small()
    del spec["linux"]
    assert translated(spec).spec.Linux.HasField("Resources")


def test_mounts_are_the_given_ones() -> None:
    mount = Mount("/data", "/guest/share/x", "bind", ("rbind", "ro"))
    guest = guest_spec(everything(), root_path="/r", mounts=[mount], seccomp=True)
    assert [(m.destination, m.source, m.type, list(m.options)) for m in guest.spec.Mounts] == [
        ("/data", "/guest/share/x", "bind", ["rbind", "ro"])
    ]


def test_what_the_api_cannot_carry_is_told() -> None:
    spec = small(personality={"domain": "LINUX32"}, resources={"unified": {"memory.high": "1"}})
    notes = translated(spec).notes
    assert "config.json.linux.personality has no place in the agent's API: left out" in notes
    assert "config.json.linux.resources.unified has no place in the agent's API: left out" in notes


@pytest.mark.parametrize(
    ("process", "text"),
    [
        ({"cwd": "/"}, "process.args is empty"),
        ({"args": [], "cwd": "/"}, "process.args is empty"),
        ({"args": ["a"]}, 'process.cwd: got "", must be an absolute path'),
        ({"args": ["a"], "cwd": "x"}, 'process.cwd: got "x", must be an absolute path'),
    ],
)
def test_a_process_that_no_runtime_could_start_is_refused(process: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        guest_process(process)
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        translated({"process": process})


def test_an_exec_keeps_all_but_the_labels() -> None:
    process = everything()["process"]
    message = guest_process(process)
    assert message.User.AdditionalGids == [3, 4294967295]
    assert (message.ConsoleSize.Height, message.ConsoleSize.Width) == (25, 80)
    assert (message.SelinuxLabel, message.ApparmorProfile) == ("", "")


def test_an_update_is_constrained_like_a_create() -> None:
    resources = guest_resources(everything()["linux"]["resources"])
    assert resources.Memory.Limit == 536870912
    assert resources.CPU.Cpus == ""
    assert not resources.HasField("BlockIO")
    assert not guest_resources({"memory": {"limit": 1}}).HasField("CPU")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def members_of(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in pairs:
        yield value, key
        if isinstance(item, dict | list):
            yield from members_of(item)


@given(st.data(), JSON)
def test_one_odd_value_anywhere_is_refused_cleanly_or_translates(data: st.DataObject, odd: Any) -> None:
    spec = json.loads((DATA / "everything.json").read_bytes())
    container, key = data.draw(st.sampled_from(list(members_of(spec))))
    container[key] = odd
    try:
        message = translated(spec).spec
    except InvalidArgument as exc:
        assert "\n" not in str(exc)
        assert len(str(exc)) < 500
    else:
        assert oci_pb2.Spec.FromString(message.SerializeToString()) == message
