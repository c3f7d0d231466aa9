"""What our schemas put on the wire, against bytes put together by hand from the field tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from protos.containerd import (
    bootstrap_pb2,
    cgroups_v1_pb2,
    cgroups_v2_pb2,
    events_pb2,
    runc_options_pb2,
    runtimeoptions_pb2,
    sandbox_pb2,
    task_types_pb2,
    task_v2_pb2,
    task_v3_pb2,
    ttrpc_events_pb2,
    types_pb2,
)
from protos.kata import agent_pb2, health_pb2, oci_pb2
from protos.ttrpc import ttrpc_pb2

ROOT = Path(__file__).parent.parent.parent

# A key is (field number << 3 | wire type): 0 varint, 1 eight bytes, 2 length and bytes.
GOLDEN: list[tuple[Message, str]] = [
    (ttrpc_pb2.KeyValue(key="k", value="v"), "0a016b 120176"),
    (
        ttrpc_pb2.Request(
            service="s", method="m", payload=b"p", timeout_nano=1, metadata=[ttrpc_pb2.KeyValue()]
        ),
        "0a0173 12016d 1a0170 2001 2a00",
    ),
    (
        ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=5, message="x"), payload=b"p"),
        "0a05 0805 120178 120170",
    ),
    (ttrpc_pb2.Request(timeout_nano=-1), "20 ffffffffffffffffff01"),
    (agent_pb2.ReseedRandomDevRequest(data=b"d"), "120164"),
    (agent_pb2.FSGroup(group_id=1, group_change_policy="OnRootMismatch"), "1001 1801"),
    (agent_pb2.WaitProcessResponse(status=137), "08 8901"),
    # Present although zero: 100 << 3 is 800, 101 << 3 is 808.
    (agent_pb2.WaitProcessResponse(stdout_bytes=0, stderr_bytes=2), "a00600 a80602"),
    (
        agent_pb2.CreateContainerRequest(
            container_id="c", OCI=oci_pb2.Spec(Version="1"), stdin_port=1, stdout_port=2, stderr_port=3
        ),
        "0a0163 3203 0a0131 4801 5002 5803",
    ),
    (oci_pb2.LinuxSyscall(errnoret=0), "1800"),
    (oci_pb2.LinuxSeccomp(DefaultAction="a", Syscalls=[oci_pb2.LinuxSyscall()]), "0a0161 2200"),
    (agent_pb2.CpuUsage(percpu_usage=[1, 2]), "1202 0102"),
    (agent_pb2.MemAgentMemcgConfig(disabled=False), "0800"),
    (task_v3_pb2.StateResponse(id="i", pid=1, status="RUNNING", exec_id="e"), "0a0169 1801 2002 5a0165"),
    (task_v2_pb2.KillRequest(id="i", signal=9, all=True), "0a0169 1809 2001"),
    (events_pb2.TaskDelete(container_id="c", id="e"), "0a0163 2a0165"),
    (types_pb2.Envelope(namespace="n", topic="/t"), "12016e 1a022f74"),
    (
        bootstrap_pb2.BootstrapParams(log_level="LOG_LEVEL_DEBUG", socket_dir=""),
        "18 fcffffffffffffffff01 4a00",
    ),
    (sandbox_pb2.CreateSandboxRequest(sandbox_id="s", netns_path="n"), "0a0173 2a016e"),
    (runtimeoptions_pb2.Options(config_body=b"b"), "1a0162"),
    (runc_options_pb2.Options(systemd_cgroup=True), "4801"),
    (cgroups_v1_pb2.MemoryStat(usage=cgroups_v1_pb2.MemoryEntry(usage=1)), "8a0202 1001"),
    (cgroups_v2_pb2.Metrics(memory=cgroups_v2_pb2.MemoryStat(usage=1)), "2203 800201"),
]


@pytest.mark.parametrize(
    ("message", "data"), GOLDEN, ids=lambda value: getattr(value, "DESCRIPTOR", value) and ""
)
def test_message_is_these_bytes_and_these_bytes_are_the_message(message: Message, data: str) -> None:
    wire = bytes.fromhex(data)
    assert message.SerializeToString(deterministic=True) == wire
    assert type(message).FromString(wire) == message


def test_the_zero_time_of_go_is_the_year_one_and_ten_bytes_long() -> None:
    zero = Timestamp(seconds=-62135596800)
    response = task_v3_pb2.WaitResponse(exit_status=1, exited_at=zero)
    assert response.SerializeToString() == bytes.fromhex("0801 120b 08 8092b8c398feffffff01")
    assert zero.ToJsonString() == "0001-01-01T00:00:00Z"


def test_services_have_the_names_that_travel_on_the_wire() -> None:
    files = [agent_pb2, health_pb2, task_v2_pb2, task_v3_pb2, ttrpc_events_pb2, sandbox_pb2]
    assert {service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values()} == {
        "grpc.AgentService",
        "grpc.Health",
        "containerd.task.v2.Task",
        "containerd.task.v3.Task",
        "containerd.services.events.ttrpc.v1.Events",
        "containerd.runtime.sandbox.v1.Sandbox",
    }


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (runc_options_pb2.Options, "containerd.runc.v1.Options"),
        (runtimeoptions_pb2.Options, "runtimeoptions.v1.Options"),
        (events_pb2.TaskExit, "containerd.events.TaskExit"),
        (cgroups_v1_pb2.Metrics, "io.containerd.cgroups.v1.Metrics"),
        (cgroups_v2_pb2.Metrics, "io.containerd.cgroups.v2.Metrics"),
        (task_types_pb2.ProcessInfo, "containerd.v1.types.ProcessInfo"),
        (types_pb2.RuntimeInfo, "containerd.types.RuntimeInfo"),
    ],
)
def test_messages_that_travel_inside_any_have_the_name_that_readers_compare(
    message: type[Message], name: str
) -> None:
    assert message.DESCRIPTOR.full_name == name


def test_both_versions_of_the_task_service_are_the_same_but_for_their_package() -> None:
    def shape(file: object) -> str:
        return (
            str(file)
            .replace("containerd.task.v3", "containerd.task.v2")
            .replace("task_v3.proto", "task_v2.proto")
        )

    def descriptor(module: object) -> object:
        from google.protobuf.descriptor_pb2 import FileDescriptorProto

        out = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(out)  # type: ignore[attr-defined]
        return out

    assert shape(descriptor(task_v2_pb2)) == shape(descriptor(task_v3_pb2))


def test_generated_code_is_up_to_date() -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools, which generates the code, is not installed")
    command = [sys.executable, ROOT / "scripts" / "gen_protos", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr
