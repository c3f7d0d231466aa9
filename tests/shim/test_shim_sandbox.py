"""The Sandbox service: a VM before there is a container, and until a client ends it."""

from __future__ import annotations

import json
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from google.protobuf.any_pb2 import Any as AnyMessage

from protos.containerd import bootstrap_pb2, sandbox_pb2
from protos.containerd import cgroups_v1_pb2 as v1
from protos.containerd import cgroups_v2_pb2 as v2
from protos.containerd.cri_sandbox_pb2 import PodSandboxConfig
from protos.containerd.runtimeoptions_pb2 import Options
from protos.kata.agent_pb2 import StatsContainerResponse
from shim import options, pod_config
from shim.start import SANDBOX_CONTROLLER
from tests.shim.bundles import Bundle, call, end
from tests.shim.pods import PID, TASK_V3, Shim
from ttrpc import methods
from ttrpc.status import Code, StatusError
from vc.errors import HypervisorError, InvalidArgument
from vc.oci.spec import GROUP_KEY
from vc.resources import Size

SANDBOX = methods.service(sandbox_pb2.DESCRIPTOR.services_by_name["Sandbox"])
CRI = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s1"}


async def ask(shim: Shim, method: str, **fields: Any) -> Any:
    return await shim.call(method, table=SANDBOX, **{"sandbox_id": "s1", **fields})


async def refused(shim: Shim, method: str, **fields: Any) -> StatusError:
    with pytest.raises(StatusError) as caught:
        await ask(shim, method, **fields)
    return caught.value


def sandbox_bundle(shim: Shim) -> Path:
    """The bundle of a sandbox has no config.json."""
    path = shim.bundles / "s1"
    path.mkdir(exist_ok=True)
    return path


async def started(shim: Shim, **fields: Any) -> Any:
    await ask(shim, "CreateSandbox", bundle_path=str(sandbox_bundle(shim)), **fields)
    return await ask(shim, "StartSandbox")


async def joined(shim: Shim, task_id: str, **fields: Any) -> None:
    """Create and start a container as containerd does when it knows the sandbox's id: version 3."""
    path = Path(shim.bundle(task_id, **fields))
    (path / "sandbox").write_text("s1")
    await shim.call("Create", table=TASK_V3, id=task_id, bundle=str(path))
    await shim.call("Start", table=TASK_V3, id=task_id)


async def test_a_sandbox_is_prepared_and_then_started_without_a_container(shim: Shim) -> None:
    bundle = sandbox_bundle(shim)
    annotations = {"io.katacontainers.config.hypervisor.default_memory": "512"}
    await ask(
        shim, "CreateSandbox", bundle_path=str(bundle), netns_path="/run/netns/p", annotations=annotations
    )
    assert shim.sandboxes == []
    assert (await ask(shim, "SandboxStatus")).state == "SANDBOX_NOTREADY"
    assert (await refused(shim, "PingSandbox")).code is Code.FAILED_PRECONDITION
    assert (bundle / "run-dir").read_text(), "a `delete` after our death must find the record"
    answer = await ask(shim, "StartSandbox")
    [sandbox] = shim.sandboxes
    assert (sandbox.id, sandbox.spec.netns, sandbox.spec.annotations) == (
        "ns--s1",
        "/run/netns/p",
        annotations,
    )
    status = await ask(shim, "SandboxStatus", verbose=True)
    assert (status.sandbox_id, status.state, status.pid, answer.pid) == ("s1", "SANDBOX_READY", PID, PID)
    assert status.created_at == answer.created_at
    assert not status.HasField("exited_at")
    await ask(shim, "PingSandbox")
    assert (await ask(shim, "Platform")).platform.os == "linux"
    assert (bundle / "init.pid").read_text() == str(PID)


async def test_containers_join_by_the_id_of_the_sandbox_or_by_their_annotations(shim: Shim) -> None:
    await started(shim)
    await joined(shim, "c1")
    await joined(shim, "c2", annotations={GROUP_KEY: "elsewhere"})
    await shim.run("c3", annotations=CRI)
    [sandbox] = shim.sandboxes
    assert set(sandbox.containers) == {"c1", "c2", "c3"}


async def test_a_sandbox_outlives_its_containers_and_a_create_that_fails(shim: Shim) -> None:
    await started(shim)
    for task_id in ("c1", "c2"):
        await joined(shim, task_id)
        await shim.call("Kill", id=task_id, signal=9)
        assert (await shim.call("Wait", id=task_id)).exit_status == 137
        await shim.call("Delete", id=task_id)
        await shim.call("Shutdown", id=task_id)

    async def fail(_: str) -> None:
        raise HypervisorError("no room")

    shim.sandboxes[0].create_hook = fail
    with pytest.raises(StatusError, match="no room"):
        await joined(shim, "c3")
    await shim.call("Shutdown", id="c3")
    assert shim.sandboxes[0].open
    assert [container.deleted for container in shim.sandboxes[0].containers.values()] == [1, 1]
    assert (await ask(shim, "SandboxStatus")).state == "SANDBOX_READY"


async def test_stopping_the_sandbox_ends_every_wait_and_leaves_the_tasks_to_be_deleted(
    shim: Shim, nursery: trio.Nursery
) -> None:
    await started(shim)
    await joined(shim, "c1")
    await shim.exec("e1")
    path = Path(shim.bundle("c2"))
    (path / "sandbox").write_text("s1")
    await shim.call("Create", id="c2", bundle=str(path))
    answers: dict[str, int] = {}

    async def wait(name: str, method: str, **fields: Any) -> None:
        table = SANDBOX if method == "WaitSandbox" else TASK_V3
        answers[name] = (await shim.call(method, table=table, **fields)).exit_status

    async with trio.open_nursery() as waiters:
        for name in ("first", "second"):
            waiters.start_soon(partial(wait, name, "WaitSandbox", sandbox_id="s1"))
        waiters.start_soon(partial(wait, "c1", "Wait", id="c1"))
        waiters.start_soon(partial(wait, "e1", "Wait", id="c1", exec_id="e1"))
        waiters.start_soon(partial(wait, "c2", "Wait", id="c2"))
        await shim.call("Connect", id="c1")  # the connection's calls are begun in their order
        await ask(shim, "StopSandbox", timeout_secs=3)
    assert answers == {"first": 0, "second": 0, "c1": 137, "e1": 137, "c2": 137}
    assert not shim.sandboxes[0].open
    status = await ask(shim, "SandboxStatus")
    assert status.state == "SANDBOX_NOTREADY"
    assert status.HasField("exited_at")
    await ask(shim, "StopSandbox")
    for task_id in ("c1", "c2"):
        assert (await shim.call("Delete", id=task_id)).exit_status == 137
    assert (await refused(shim, "StartSandbox")).code is Code.FAILED_PRECONDITION
    with pytest.raises(StatusError, match="does not run here"):
        await joined(shim, "c3")
    assert len(shim.sandboxes) == 1


async def test_a_sandbox_that_never_ran_can_be_stopped_and_waited_for(shim: Shim) -> None:
    await ask(shim, "CreateSandbox", bundle_path=str(sandbox_bundle(shim)))
    assert (await shim.fails("Create", id="alone", bundle=shim.bundle("alone"))).code is Code.ALREADY_EXISTS
    await ask(shim, "StopSandbox")
    assert (await ask(shim, "WaitSandbox")).exit_status == 0
    assert (await refused(shim, "StartSandbox")).code is Code.FAILED_PRECONDITION
    assert shim.sandboxes == []


async def test_the_death_of_the_vm_is_the_end_of_the_sandbox(shim: Shim) -> None:
    await started(shim)
    await joined(shim, "c1")
    shim.sandboxes[0].die()
    assert (await ask(shim, "WaitSandbox")).exit_status == 137
    assert (await shim.call("Wait", id="c1")).exit_status == 137
    assert (await ask(shim, "SandboxStatus")).state == "SANDBOX_NOTREADY"
    await ask(shim, "StopSandbox")
    assert (await ask(shim, "WaitSandbox")).exit_status == 137, "the first cause stays"
    assert not shim.sandboxes[0].open


@pytest.mark.parametrize("begun", ["nothing", "CreateSandbox", "StartSandbox", "StopSandbox"])
async def test_shutdown_ends_the_process_in_whatever_state(shim: Shim, begun: str) -> None:
    if begun != "nothing":
        await ask(shim, "CreateSandbox", bundle_path=str(sandbox_bundle(shim)))
    if begun in ("StartSandbox", "StopSandbox"):
        await ask(shim, "StartSandbox")
    if begun == "StopSandbox":
        await ask(shim, "StopSandbox")
    await ask(shim, "ShutdownSandbox")
    with trio.fail_after(20):
        await shim.ended.wait()
    assert all(not sandbox.open for sandbox in shim.sandboxes)


async def test_shutdown_with_a_running_container_tells_its_exit(shim: Shim) -> None:
    await started(shim)
    await joined(shim, "c1")
    await ask(shim, "ShutdownSandbox")
    with trio.fail_after(20):
        await shim.ended.wait()
    assert [topic for topic, _ in shim.events] == ["/tasks/create", "/tasks/start", "/tasks/exit"]


async def test_a_start_that_fails_leaves_nothing_and_can_be_tried_again(shim: Shim) -> None:
    async def fail(_: object) -> None:
        raise HypervisorError("no QEMU")

    hook, shim.open_hook = shim.open_hook, fail
    await ask(shim, "CreateSandbox", bundle_path=str(sandbox_bundle(shim)))
    assert "no QEMU" in (await refused(shim, "StartSandbox")).message
    shim.open_hook = hook
    await ask(shim, "StartSandbox")
    assert (await ask(shim, "SandboxStatus")).state == "SANDBOX_READY"


async def test_a_process_is_one_sandbox_only(shim: Shim) -> None:
    await started(shim)
    bundle = str(sandbox_bundle(shim))
    assert (await refused(shim, "CreateSandbox", bundle_path=bundle)).code is Code.ALREADY_EXISTS
    assert (await refused(shim, "StartSandbox")).code is Code.FAILED_PRECONDITION
    assert (await shim.fails("Create", id="alone", bundle=shim.bundle("alone"))).code is Code.ALREADY_EXISTS
    methods = ["StartSandbox", "StopSandbox", "WaitSandbox", "SandboxStatus", "PingSandbox", "Platform"]
    for method in [*methods, "SandboxMetrics", "ShutdownSandbox"]:
        assert (await refused(shim, method, sandbox_id="other")).code is Code.NOT_FOUND, method


async def test_a_shim_of_containers_is_no_sandbox(shim: Shim) -> None:
    await shim.run("c1")
    bundle = str(sandbox_bundle(shim))
    assert (await refused(shim, "CreateSandbox", bundle_path=bundle)).code is Code.ALREADY_EXISTS
    assert (await refused(shim, "ShutdownSandbox")).code is Code.NOT_FOUND
    assert (await shim.call("State", id="c1")).status == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sandbox_id": "../x"}, "sandbox id"),
        ({"bundle_path": "relative"}, "is no absolute path"),
        ({"bundle_path": "/no/such"}, "is no directory"),
        (
            {"options": AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=b"\xff")},
            "the pod's configuration",
        ),
    ],
)
async def test_what_makes_no_sense_is_refused_and_the_process_is_free(
    shim: Shim, fields: dict[str, Any], words: str
) -> None:
    error = await refused(shim, "CreateSandbox", **{"bundle_path": str(sandbox_bundle(shim)), **fields})
    assert (error.code, words in error.message) == (Code.INVALID_ARGUMENT, True), error
    await started(shim)


async def test_the_counters_are_those_of_all_containers(shim: Shim) -> None:
    await started(shim)
    for task_id in ("c1", "c2", "c3"):
        await joined(shim, task_id)
    for task_id, usage in (("c1", 1 << 20), ("c2", 2 << 20)):
        counters = StatsContainerResponse()
        counters.cgroup_stats.memory_stats.usage.usage = usage
        counters.cgroup_stats.memory_stats.usage.limit = (1 << 63) - 1
        counters.cgroup_stats.memory_stats.stats["anon"] = usage // 2
        counters.cgroup_stats.pids_stats.current = 3
        counters.cgroup_stats.cpu_stats.cpu_usage.total_usage = 5_000_000
        shim.container(task_id).counters = counters
    found = (await ask(shim, "SandboxMetrics")).metrics
    assert found.id == "s1"
    if found.data.type_url == v1.Metrics.DESCRIPTOR.full_name:
        old = v1.Metrics.FromString(found.data.value)
        told = (old.memory.usage.usage, old.memory.total_rss, old.pids.current, old.cpu.usage.total // 1000)
    else:
        new = v2.Metrics.FromString(found.data.value)
        told = (new.memory.usage, new.memory.anon, new.pids.current, new.cpu.usage_usec)
    assert told == (3 << 20, 3 << 19, 6, 10_000)


def test_the_configuration_of_a_pod_says_what_its_vm_is_to_be() -> None:
    config = PodSandboxConfig(hostname="web-0")
    config.dns_config.servers.extend(["10.0.0.10", "10.0.0.11"])
    config.dns_config.searches.extend(["a.svc", "svc"])
    config.dns_config.options.append("ndots:5")
    resources = config.linux.resources
    resources.cpu_quota, resources.cpu_period, resources.memory_limit_in_bytes = 150_000, 100_000, 300 << 20
    given = AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=config.SerializeToString())
    assert pod_config.read(given) == pod_config.PodConfig(
        "web-0",
        ("nameserver 10.0.0.10", "nameserver 10.0.0.11", "search a.svc svc", "options ndots:5"),
        Size(1.5, 300),
    )
    given.type_url = "google.protobuf.Empty"
    assert pod_config.read(given) == pod_config.PodConfig()


def chosen(path: str) -> AnyMessage:
    value = Options(config_path=path).SerializeToString()
    return AnyMessage(type_url="runtimeoptions.v1.Options", value=value)


def test_the_options_of_start_name_the_configuration() -> None:
    """There is no other place for those of a sandbox: CreateSandbox has the pod's instead."""
    told = bootstrap_pb2.BootstrapParams(instance_id="s1", namespace="ns")
    told.extensions.add(value=AnyMessage(type_url="other"))
    told.extensions.add(value=chosen("/new.toml"))
    read = partial(options.from_start, task_id="s1", namespace="ns")
    assert read(told.SerializeToString()) == "/new.toml"
    assert read(chosen("/old.toml").SerializeToString()) == "/old.toml"
    for nothing in (b"", b"\xff\xff", AnyMessage(type_url="x").SerializeToString()):
        assert read(nothing) is None
    with pytest.raises(InvalidArgument):
        read(AnyMessage(type_url="runtimeoptions.v1.Options", value=b"\xff").SerializeToString())


@pytest.fixture
def sandbox_place(made: Bundle) -> Bundle:
    """A bundle as containerd 2.x makes it for a sandbox: in that place, and without config.json."""
    place = made.path.parent / SANDBOX_CONTROLLER / "ns" / "c1"
    place.parent.mkdir(parents=True)
    (made.path / "config.json").unlink()
    made.path.rename(place)
    made.path = place
    return made


async def test_start_offers_version_3_for_a_sandbox_and_delete_ends_its_shim(sandbox_place: Bundle) -> None:
    """2.x lets containers join by the sandbox's id alone only where version 3 is offered."""
    made = sandbox_place
    printed = json.loads(made.shim("start", stdin=made.bootstrap()))
    assert printed == {"version": 3, "address": f"unix://{made.socket()}", "protocol": "ttrpc"}
    assert (made.path / "address").read_text() == printed["address"]
    await call(made.socket(), "Connect")
    made.shim("delete", "-bundle", str(made.path))
    end(made.pid())
    assert not made.socket().exists()


async def test_delete_of_a_container_that_joined_leaves_the_sandbox_alone(sandbox_place: Bundle) -> None:
    made = sandbox_place
    made.shim("start", stdin=made.bootstrap())
    try:
        joined = made.path.parent / "c2"
        joined.mkdir()
        (joined / "config.json").write_text("{}")
        (joined / "sandbox").write_text("c1")
        # What a joined container's bundle would need for the sandbox to be taken for its own.
        (joined / "shim.pid").write_text(str(made.pid()))
        done: subprocess.CompletedProcess[bytes] = made.run("delete", "-bundle", str(joined), task_id="c1")
        assert done.returncode == 0, done.stdout
        await call(made.socket(), "Connect")
    finally:
        end(made.pid(), signal.SIGTERM)
