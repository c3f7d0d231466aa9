"""The API's Spec as config.json, and the JSON text of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import jsontext, oci
from agent.errors import Unsupported
from protos.kata import oci_pb2

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_json_text_means_what_was_encoded(value: object) -> None:
    assert json.loads(jsontext.encode(value)) == value


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="bytes"):
        jsontext.encode([b"x"])


def translate(spec: oci_pb2.Spec, namespaces: dict[str, str] | None = None) -> dict[str, object]:
    config = oci.config(spec, root="/r", namespaces=namespaces or {}, cgroups_path="/c")
    loaded = json.loads(jsontext.encode(config))
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("version", ["", "1.0.2-dev", "1.2.0", "1.2.1"])
def test_the_version_is_that_of_the_document_and_not_of_the_spec(version: str) -> None:
    """containerd 1.7 and 2 say 1.2, which the guest's crun refused: "unknown version specified"."""
    assert translate(oci_pb2.Spec(Version=version))["ociVersion"] == "1.0.2"


def test_a_process_keeps_everything_that_it_had() -> None:
    process = oci_pb2.Process(
        Terminal=True,
        ConsoleSize=oci_pb2.Box(Height=24, Width=80),
        User=oci_pb2.User(UID=1, GID=2, AdditionalGids=[3, 4], Username="u"),
        Args=["a", "b"],
        Env=["K=V"],
        Cwd="/w",
        Capabilities=oci_pb2.LinuxCapabilities(Bounding=["CAP_CHOWN"], Ambient=["CAP_KILL"]),
        Rlimits=[oci_pb2.POSIXRlimit(Type="RLIMIT_NOFILE", Hard=20, Soft=10)],
        NoNewPrivileges=True,
        OOMScoreAdj=-5,
        ApparmorProfile="not in a guest",
        SelinuxLabel="not in a guest",
    )
    assert oci.process(process) == {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1, "gid": 2, "additionalGids": [3, 4], "username": "u"},
        "args": ["a", "b"],
        "env": ["K=V"],
        "cwd": "/w",
        "capabilities": {
            "bounding": ["CAP_CHOWN"],
            "effective": [],
            "inheritable": [],
            "permitted": [],
            "ambient": ["CAP_KILL"],
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 20, "soft": 10}],
        "noNewPrivileges": True,
        "oomScoreAdj": -5,
    }


def test_an_exec_without_capabilities_takes_those_of_its_container() -> None:
    own = oci_pb2.LinuxCapabilities(Effective=["CAP_CHOWN"])
    assert oci.process(oci_pb2.Process(), capabilities=own)["capabilities"]["effective"] == ["CAP_CHOWN"]
    named = oci_pb2.Process(Capabilities=oci_pb2.LinuxCapabilities())
    assert oci.process(named, capabilities=own)["capabilities"]["effective"] == []


def test_zero_is_not_given() -> None:
    assert oci.resources(oci_pb2.LinuxResources()) == {}
    limits = oci_pb2.LinuxResources(
        Memory=oci_pb2.LinuxMemory(Limit=5, Reservation=0), CPU=oci_pb2.LinuxCPU(Quota=0, Shares=2)
    )
    assert oci.resources(limits) == {"memory": {"limit": 5}, "cpu": {"shares": 2}}


def test_no_limit_of_memory_means_none_of_swap() -> None:
    limits = oci_pb2.LinuxResources(Memory=oci_pb2.LinuxMemory(Limit=-1))
    assert oci.resources(limits) == {"memory": {"limit": -1, "swap": -1}}


def test_namespaces_of_the_sandbox_are_joined_and_others_made() -> None:
    spec = oci_pb2.Spec(
        Linux=oci_pb2.Linux(
            Namespaces=[
                oci_pb2.LinuxNamespace(Type="network", Path="/host/netns"),
                oci_pb2.LinuxNamespace(Type="user"),
                oci_pb2.LinuxNamespace(Type="cgroup"),
                oci_pb2.LinuxNamespace(Type="uts"),
            ]
        )
    )
    linux = translate(spec, {"uts": "/proc/1/ns/uts", "pid": ""})["linux"]
    assert isinstance(linux, dict)
    assert linux["namespaces"] == [
        {"type": "cgroup"},
        {"type": "uts", "path": "/proc/1/ns/uts"},
        {"type": "mount"},
        {"type": "pid"},
    ]


def test_a_user_namespace_with_mappings_is_refused_and_not_forgotten() -> None:
    spec = oci_pb2.Spec(
        Linux=oci_pb2.Linux(
            Namespaces=[oci_pb2.LinuxNamespace(Type="user")],
            UIDMappings=[oci_pb2.LinuxIDMapping(ContainerID=0, HostID=100000, Size=65536)],
        )
    )
    with pytest.raises(Unsupported, match="uidMappings"):
        translate(spec)


def test_a_umask_of_0_is_one_that_was_given() -> None:
    assert "umask" not in user_of(oci_pb2.User())
    assert user_of(oci_pb2.User(Umask=0))["umask"] == 0
    assert user_of(oci_pb2.User(Umask=0o27))["umask"] == 0o27


def user_of(user: oci_pb2.User) -> dict[str, object]:
    found = oci.process(oci_pb2.Process(User=user))["user"]
    assert isinstance(found, dict)
    return found


def test_sysctls_of_the_network_are_for_the_guest_and_not_for_crun() -> None:
    spec = oci_pb2.Spec(
        Linux=oci_pb2.Linux(Sysctl={"net.ipv4.ip_forward": "1", "net.a/b.c": "2", "kernel.shmmax": "3"})
    )
    assert oci.net_sysctls(spec) == {"net/ipv4/ip_forward": "1", "net/a.b/c": "2"}
    linux = translate(spec)["linux"]
    assert isinstance(linux, dict)
    assert linux["sysctl"] == {"kernel.shmmax": "3"}


def test_hooks_and_the_host_name_stay_on_the_host() -> None:
    spec = oci_pb2.Spec(
        Hostname="h",
        Annotations={"run.oci.handler": "x"},
        Hooks=oci_pb2.Hooks(Prestart=[oci_pb2.Hook(Path="/bin/hook")]),
    )
    assert not {"hooks", "hostname", "annotations"} & translate(spec).keys()


def test_seccomp_keeps_the_difference_between_no_errno_and_errno_0() -> None:
    message = oci_pb2.LinuxSeccomp(
        DefaultAction="SCMP_ACT_ERRNO",
        Architectures=["SCMP_ARCH_X86_64"],
        Syscalls=[
            oci_pb2.LinuxSyscall(Names=["a"], Action="SCMP_ACT_ALLOW"),
            oci_pb2.LinuxSyscall(
                Names=["b"],
                Action="SCMP_ACT_ERRNO",
                errnoret=0,
                Args=[oci_pb2.LinuxSeccompArg(Index=1, Value=2, ValueTwo=3, Op="SCMP_CMP_MASKED_EQ")],
            ),
        ],
    )
    assert oci.seccomp(message) == {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["a"], "action": "SCMP_ACT_ALLOW"},
            {
                "names": ["b"],
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": 0,
                "args": [{"index": 1, "value": 2, "op": "SCMP_CMP_MASKED_EQ", "valueTwo": 3}],
            },
        ],
    }


def test_device_rules_deny_first_and_allow_what_every_container_has() -> None:
    rules = oci.resources(oci_pb2.LinuxResources(), with_devices=True)["devices"]
    assert isinstance(rules, list)
    assert rules[0] == {"allow": False, "access": "rwm"}
    assert {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"} in rules


def test_a_rule_for_any_device_has_no_numbers() -> None:
    rule = oci_pb2.LinuxDeviceCgroup(Allow=True, Type="c", Major=-1, Minor=-1, Access="rw")
    resources = oci_pb2.LinuxResources(Devices=[rule])
    rules = oci.resources(resources, with_devices=True)["devices"]
    assert isinstance(rules, list)
    assert rules[0] == {"allow": True, "type": "c", "access": "rw"}


def test_nodes_that_the_runtime_makes_are_not_asked_for_twice() -> None:
    """Symptom: "File exists" for privileged pods, whose specs list every device of the host."""
    spec = oci_pb2.Spec(
        Linux=oci_pb2.Linux(
            Devices=[
                oci_pb2.LinuxDevice(Path="/dev/null", Type="c", Major=1, Minor=3),
                oci_pb2.LinuxDevice(Path="/dev/vda", Type="b", Major=254, Minor=0, FileMode=0o660),
            ]
        )
    )
    linux = translate(spec)["linux"]
    assert isinstance(linux, dict)
    assert linux["devices"] == [
        {"path": "/dev/vda", "type": "b", "uid": 0, "gid": 0, "major": 254, "minor": 0, "fileMode": 0o660}
    ]


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("", "/cid"),
        ("/kata/cid", "/kata/cid"),
        ("system.slice:kata:cid", "/system.slice/kata/cid"),
        ("/../../etc", "/etc"),
    ],
)
def test_cgroup_paths_stay_below_the_root(requested: str, expected: str) -> None:
    assert oci.cgroups_path(requested, "cid") == expected
