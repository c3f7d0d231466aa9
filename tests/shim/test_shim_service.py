"""The serving process over a real socket, as containerd drives it; the sandbox below it is made of memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio
from google.protobuf.any_pb2 import Any as AnyMessage

from protos.containerd import task_v2_pb2, task_v3_pb2, types_pb2
from protos.kata.agent_pb2 import StatsContainerResponse
from shim import serve
from tests.shim.pods import (
    EXEC_SPEC,
    PID,
    TASK,
    TASK_V3,
    FakeProcess,
    FakeSandbox,
    Shim,
    nothing,
)
from ttrpc.client import Client
from ttrpc.server import PeerCredentials, Server
from ttrpc.status import Code, StatusError
from vc.errors import AgentError, HypervisorError, InvalidArgument, WrongState
from vc.process import StdioRequest
from vc.storage.mounts import Mount


async def test_a_task_lives_from_create_to_shutdown_and_every_step_is_announced_in_order(shim: Shim) -> None:
    assert (await shim.create()).pid == PID
    assert (await shim.call("Connect", id="c1")).task_pid == PID
    assert (await shim.call("State", id="c1")).status == 1
    assert (await shim.call("Start", id="c1")).pid == PID
    state = await shim.call("State", id="c1")
    assert (state.status, state.pid, state.HasField("exited_at")) == (2, PID, False)
    shim.container().init.end(7)
    waited = await shim.call("Wait", id="c1")
    assert waited.exit_status == 7
    state = await shim.call("State", id="c1")
    assert (state.status, state.exit_status, state.exited_at) == (3, 7, waited.exited_at)
    deleted = await shim.call("Delete", id="c1")
    assert (deleted.pid, deleted.exit_status, deleted.exited_at) == (PID, 7, waited.exited_at)
    assert not shim.sandboxes[0].open
    await shim.call("Shutdown", id="c1")
    with trio.fail_after(10):
        await shim.ended.wait()
    topics = await shim.wait_events(4)
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    exited = shim.events[2][1]
    assert (exited.container_id, exited.id, exited.pid, exited.exit_status) == ("c1", "c1", PID, 7)
    assert shim.events[3][1].id == ""
    assert not shim.socket.exists()


async def test_version_3_of_the_service_is_the_same_service(shim: Shim) -> None:
    await shim.create()
    state = await shim.call("State", table=TASK_V3, id="c1")
    assert (type(state), state.id) == (task_v3_pb2.StateResponse, "c1")


async def test_the_sandbox_is_made_of_the_spec_and_the_namespace(shim: Shim) -> None:
    await shim.call("Create", id="c1", bundle=shim.bundle("c1", hostname="h1"))
    spec = shim.sandboxes[0].spec
    assert (spec.id, spec.hostname, spec.netns) == ("ns--c1", "h1", "/run/netns/x")
    assert (shim.bundles / "c1" / "run-dir").read_text() == str(shim.bundles / "run")
    assert (shim.bundles / "c1" / "init.pid").read_text() == str(PID)


async def test_the_root_is_where_the_mounts_go_or_where_the_spec_says(shim: Shim) -> None:
    await shim.call(
        "Create",
        id="c1",
        bundle=shim.bundle("c1"),
        rootfs=[types_pb2.Mount(type="bind", source="/x", options=["rbind", "ro"])],
    )
    given = shim.container().given
    assert given["rootfs"] == shim.bundles / "c1" / "rootfs"
    assert given["rootfs_mounts"] == (Mount("bind", "/x", "", ("rbind", "ro")),)
    await shim.call("Delete", id="c1")
    await shim.call("Create", id="c2", bundle=shim.bundle("c2", root={"path": "/mnt/docker"}))
    assert shim.container("c2").given["rootfs"] == Path("/mnt/docker")


async def test_the_request_decides_about_the_terminal(shim: Shim) -> None:
    await shim.create(terminal=True)
    assert shim.container().spec["process"]["terminal"] is True
    assert shim.container().given["stdio"] == StdioRequest(stdout=True, terminal=True)


async def test_exit_is_published_after_start_even_if_the_process_dies_at_once(shim: Shim) -> None:
    async def die(process: FakeProcess) -> None:
        process.end(3)
        await trio.testing.wait_all_tasks_blocked()

    shim.prepare = lambda sandbox: setattr(sandbox, "start_hook", die)
    await shim.run()
    topics = await shim.wait_events(3)
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit"]


# What is allowed in which state: facts of the reference shim, with FAILED_PRECONDITION for its UNKNOWN.
OK, PRE, GONE = Code.OK, Code.FAILED_PRECONDITION, Code.NOT_FOUND
INIT_TABLE = {
    "created": {"Start": OK, "Exec": OK, "Kill": OK, "Pause": PRE, "Resume": PRE, "Update": OK, "Delete": OK},
    "running": {
        "Start": PRE,
        "Exec": OK,
        "Kill": OK,
        "Pause": OK,
        "Resume": PRE,
        "Update": OK,
        "Delete": PRE,
    },
    "paused": {
        "Start": PRE,
        "Exec": PRE,
        "Kill": OK,
        "Pause": PRE,
        "Resume": OK,
        "Update": OK,
        "Delete": PRE,
    },
    "stopped": {
        "Start": PRE,
        "Exec": PRE,
        "Kill": GONE,
        "Pause": PRE,
        "Resume": PRE,
        "Update": PRE,
        "Delete": OK,
    },
    "deleted": dict.fromkeys(("Start", "Exec", "Kill", "Pause", "Resume", "Update", "Delete"), GONE),
}
FIELDS: dict[str, dict[str, Any]] = {
    "Exec": {"exec_id": "e9", "spec": EXEC_SPEC},
    "Kill": {"signal": 15},
    "Update": {"resources": AnyMessage(type_url="x/LinuxResources", value=b"{}")},
}


async def bring_to(shim: Shim, state: str) -> None:
    await shim.create()
    if state != "created":
        await shim.call("Start", id="c1")
    if state == "paused":
        await shim.call("Pause", id="c1")
    if state in ("stopped", "deleted"):
        shim.container().init.end(0)
        await shim.call("Wait", id="c1")
    if state == "deleted":
        await shim.call("Delete", id="c1")


@pytest.mark.parametrize(
    ("state", "call", "code"),
    [(state, call, code) for state, row in INIT_TABLE.items() for call, code in row.items()],
)
async def test_calls_on_init_are_answered_by_state(shim: Shim, state: str, call: str, code: Code) -> None:
    await bring_to(shim, state)
    if code is OK:
        await shim.call(call, id="c1", **FIELDS.get(call, {}))
    else:
        assert (await shim.fails(call, id="c1", **FIELDS.get(call, {}))).code is code


EXEC_TABLE = {
    "created": {"Start": OK, "Kill": PRE, "ResizePty": OK, "Delete": OK},
    "running": {"Start": PRE, "Kill": OK, "ResizePty": OK, "Delete": PRE},
    "stopped": {"Start": PRE, "Kill": GONE, "ResizePty": PRE, "Delete": OK},
    "deleted": {"Start": GONE, "Kill": GONE, "ResizePty": GONE, "Delete": GONE, "State": GONE, "Wait": GONE},
}


@pytest.mark.parametrize(
    ("state", "call", "code"),
    [(state, call, code) for state, row in EXEC_TABLE.items() for call, code in row.items()],
)
async def test_calls_on_an_exec_are_answered_by_state(shim: Shim, state: str, call: str, code: Code) -> None:
    container = await shim.run()
    await shim.call("Exec", id="c1", exec_id="e1", spec=EXEC_SPEC, terminal=True)
    if state != "created":
        await shim.call("Start", id="c1", exec_id="e1")
    if state in ("stopped", "deleted"):
        container.execs["e1"].end(0)
        await shim.call("Wait", id="c1", exec_id="e1")
    if state == "deleted":
        await shim.call("Delete", id="c1", exec_id="e1")
    fields = {"signal": 15} if call == "Kill" else {}
    if code is OK:
        await shim.call(call, id="c1", exec_id="e1", **fields)
    else:
        assert (await shim.fails(call, id="c1", exec_id="e1", **fields)).code is code


async def test_kill_of_all_processes_of_a_stopped_task_is_fine(shim: Shim) -> None:
    await bring_to(shim, "stopped")
    await shim.call("Kill", id="c1", signal=9, all=True)


async def test_kill_of_a_created_task_ends_it_and_a_probe_does_not(shim: Shim) -> None:
    await shim.create()
    await shim.call("Kill", id="c1", signal=0)
    assert (await shim.call("State", id="c1")).status == 1
    await shim.call("Kill", id="c1", signal=9, all=True)
    assert (await shim.call("Wait", id="c1")).exit_status == 137
    assert await shim.wait_events(2) == ["/tasks/create", "/tasks/exit"]
    assert (await shim.call("Delete", id="c1")).exit_status == 137


async def test_delete_of_a_created_task_releases_its_waiters(shim: Shim, nursery: trio.Nursery) -> None:
    await shim.create()
    answers: list[Any] = []

    async def wait() -> None:
        answers.append(await shim.call("Wait", id="c1"))

    async with trio.open_nursery() as waiters:
        waiters.start_soon(wait)
        waiters.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await shim.call("Delete", id="c1")
    assert [answer.exit_status for answer in answers] == [137, 137]
    assert await shim.wait_events(3) == ["/tasks/create", "/tasks/exit", "/tasks/delete"]


async def test_a_failed_create_leaves_nothing_and_the_shim_ends_at_shutdown(shim: Shim) -> None:
    async def refuse(spec: object) -> None:
        raise HypervisorError("qemu: cannot allocate memory")

    shim.open_hook = refuse
    error = await shim.fails("Create", id="c1", bundle=shim.bundle("c1"))
    assert (error.code, "cannot allocate memory" in error.message) == (Code.INTERNAL, True)
    assert (await shim.fails("State", id="c1")).code is Code.NOT_FOUND
    assert (await shim.fails("Delete", id="c1")).code is Code.NOT_FOUND
    await shim.call("Shutdown", id="c1")
    with trio.fail_after(10):
        await shim.ended.wait()
    assert shim.events == []


async def test_a_create_that_fails_in_the_guest_ends_the_sandbox_and_can_be_repeated(shim: Shim) -> None:
    async def refuse(container_id: str) -> None:
        raise AgentError("CreateContainer", 13, "no such layer")

    shim.prepare = lambda sandbox: setattr(sandbox, "create_hook", refuse)
    error = await shim.fails("Create", id="c1", bundle=shim.bundle("c1"))
    assert "no such layer" in error.message
    assert not shim.sandboxes[0].open
    shim.prepare = lambda sandbox: None
    await shim.create()
    assert [sandbox.open for sandbox in shim.sandboxes] == [False, True]


async def test_state_says_not_found_and_does_not_wait_while_a_create_is_under_way(shim: Shim) -> None:
    opening, go_on = trio.Event(), trio.Event()

    async def slow(spec: object) -> None:
        opening.set()
        await go_on.wait()

    shim.open_hook = slow
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shim.create)
        await opening.wait()
        assert (await shim.fails("State", id="c1")).code is Code.NOT_FOUND
        assert (await shim.fails("Create", id="c1", bundle=shim.bundle("c1"))).code is Code.ALREADY_EXISTS
        await shim.call("Shutdown", id="c1")
        go_on.set()
    assert (await shim.call("State", id="c1")).status == 1


async def test_a_create_whose_client_is_gone_is_undone(shim: Shim) -> None:
    """A containerd that restarts during a Create never asks for that task again."""
    creating, undone = trio.Event(), trio.Event()

    async def hang(container_id: str) -> None:
        creating.set()
        try:
            await trio.sleep_forever()
        finally:
            undone.set()

    shim.prepare = lambda sandbox: setattr(sandbox, "create_hook", hang)
    async with trio.open_nursery() as nursery:
        other = Client(await trio.open_unix_socket(str(shim.socket)))
        nursery.start_soon(other.run)
        other.open_stream(TASK["Create"], task_v2_pb2.CreateTaskRequest(id="c1", bundle=shim.bundle("c1")))
        await creating.wait()
        await other.aclose()
        with trio.fail_after(10):
            await undone.wait()
    shim.prepare = lambda sandbox: None
    await shim.create("c2")
    assert [sandbox.open for sandbox in shim.sandboxes] == [False, True]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "config.json"),
        ("{", "not JSON"),
        ("[]", "object"),
        ('{"ociVersion": "1.0"}', "process"),
        (
            '{"process": {"args": ["a"]}, "annotations": {"io.kubernetes.cri.container-type": "x"}}',
            "container-type",
        ),
    ],
)
async def test_a_broken_bundle_is_an_invalid_argument_that_names_it(
    shim: Shim, content: str | None, word: str
) -> None:
    bundle = Path(shim.bundle("c1"))
    (bundle / "config.json").unlink()
    if content is not None:
        (bundle / "config.json").write_text(content)
    error = await shim.fails("Create", id="c1", bundle=str(bundle))
    assert error.code is Code.INVALID_ARGUMENT
    assert word in error.message
    assert shim.sandboxes == []


async def test_stdio_that_cannot_be_is_refused_before_a_vm_is_booted(shim: Shim, tmp_path: Path) -> None:
    for field_name, value in (
        ("stdout", "ftp://x/y"),
        ("stdin", str(tmp_path / "missing")),
        ("stdout", str(tmp_path / "missing")),
        ("stdout", "binary:///no/such/logger"),
    ):
        error = await shim.fails("Create", id="c1", bundle=shim.bundle("c1"), **{field_name: value})
        assert error.code is Code.INVALID_ARGUMENT
        assert value.rpartition("//")[2] in error.message
    assert shim.sandboxes == []


async def test_config_errors_reach_the_user(shim: Shim) -> None:
    async def refuse(spec: object) -> None:
        raise InvalidArgument("kernel '/no/vmlinux' does not exist")

    shim.open_hook = refuse
    error = await shim.fails("Create", id="c1", bundle=shim.bundle("c1"))
    assert error.code is Code.INVALID_ARGUMENT
    assert "/no/vmlinux" in error.message


async def test_when_the_vm_dies_every_process_has_ended_and_can_be_deleted(shim: Shim) -> None:
    await shim.run()
    await shim.exec("running")
    await shim.call("Exec", id="c1", exec_id="created", spec=EXEC_SPEC)
    shim.sandboxes[0].die()
    for exec_id in ("running", "created", ""):
        assert (await shim.call("Wait", id="c1", exec_id=exec_id)).exit_status == 137
        assert (await shim.call("State", id="c1", exec_id=exec_id)).status == 3
    assert (await shim.call("Delete", id="c1")).exit_status == 137
    topics = await shim.wait_events(8)
    assert [topic for topic in topics if "exit" in topic] == ["/tasks/exit"] * 2
    exits = [event for topic, event in shim.events if topic == "/tasks/exit"]
    assert [event.id for event in exits] == ["running", "c1"]


async def test_when_the_vm_dies_a_created_task_ends_too(shim: Shim) -> None:
    await shim.create()
    shim.sandboxes[0].gone.set()
    assert (await shim.call("Wait", id="c1")).exit_status == 137
    await shim.call("Delete", id="c1")


async def test_kill_after_the_vm_died_is_no_error(shim: Shim) -> None:
    container = await shim.run()
    shim.sandboxes[0].gone.set()
    await shim.call("Kill", id="c1", signal=9)
    container.init.end(137)
    assert (await shim.call("Wait", id="c1")).exit_status == 137


async def test_execs_end_before_their_container_even_if_the_guest_forgets_them(shim: Shim) -> None:
    container = await shim.run()
    process = await shim.exec("e1")
    process.dies_of = set()
    container.init.end(0)
    assert (await shim.call("Wait", id="c1", exec_id="e1")).exit_status == 137
    assert (await shim.call("Wait", id="c1")).exit_status == 0
    await shim.wait_events(6)
    exits = [event.id for topic, event in shim.events if topic == "/tasks/exit"]
    assert exits == ["e1", "c1"]
    assert process.signals == [9]


async def test_an_exec_that_fails_to_start_stays_created_and_can_be_tried_again(shim: Shim) -> None:
    await shim.run()
    await shim.call("Exec", id="c1", exec_id="e1", spec=EXEC_SPEC)

    async def refuse(process: FakeProcess) -> None:
        raise AgentError("ExecProcess", 13, 'exec: "nope": executable file not found in $PATH')

    shim.sandboxes[0].start_hook = refuse
    error = await shim.fails("Start", id="c1", exec_id="e1")
    assert "executable file not found in $PATH" in error.message
    assert (await shim.call("State", id="c1", exec_id="e1")).status == 1
    shim.sandboxes[0].start_hook = nothing
    await shim.call("Start", id="c1", exec_id="e1")
    topics = await shim.wait_events(4)
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started"]


async def test_a_second_exec_of_the_same_id_already_exists(shim: Shim) -> None:
    await shim.run()
    await shim.call("Exec", id="c1", exec_id="e1", spec=EXEC_SPEC)
    error = await shim.fails("Exec", id="c1", exec_id="e1", spec=EXEC_SPEC)
    assert error.code is Code.ALREADY_EXISTS


async def test_an_exec_is_shown_as_paused_while_its_container_is(shim: Shim) -> None:
    await shim.run()
    await shim.exec("e1")
    await shim.call("Pause", id="c1")
    assert (await shim.call("State", id="c1", exec_id="e1")).status == 4
    await shim.call("Resume", id="c1")
    assert (await shim.call("State", id="c1", exec_id="e1")).status == 2
    topics = await shim.wait_events(6)
    assert topics[-2:] == ["/tasks/paused", "/tasks/resumed"]


async def test_one_of_two_deletes_at_once_wins_and_the_other_finds_nothing(shim: Shim) -> None:
    await bring_to(shim, "stopped")
    results: list[int] = []

    async def delete() -> None:
        try:
            await shim.call("Delete", id="c1")
            results.append(0)
        except StatusError as exc:
            results.append(exc.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(delete)
        nursery.start_soon(delete)
    assert sorted(results) == [0, Code.NOT_FOUND]
    assert (await shim.wait_events(4)).count("/tasks/delete") == 1


async def test_a_delete_whose_client_gave_up_is_finished_anyway(shim: Shim) -> None:
    await bring_to(shim, "stopped")
    deleting, go_on = trio.Event(), trio.Event()

    async def slow(_: FakeSandbox) -> None:
        deleting.set()
        await go_on.wait()

    shim.sandboxes[0].end_hook = slow
    async with trio.open_nursery() as nursery:
        other = Client(await trio.open_unix_socket(str(shim.socket)))
        nursery.start_soon(other.run)
        other.open_stream(TASK["Delete"], task_v2_pb2.DeleteRequest(id="c1"))
        await deleting.wait()
        await other.aclose()
    go_on.set()
    topics = await shim.wait_events(4)
    assert topics[-1] == "/tasks/delete"
    assert (await shim.fails("Delete", id="c1")).code is Code.NOT_FOUND


async def test_shutdown_with_a_task_left_changes_nothing(shim: Shim) -> None:
    await shim.run()
    await shim.call("Shutdown", id="c1")
    assert (await shim.call("State", id="c1")).status == 2


async def test_the_end_of_a_connection_ends_nothing(shim: Shim) -> None:
    await shim.run()
    await shim.client.aclose()
    async with trio.open_nursery() as nursery:
        shim.client = Client(await trio.open_unix_socket(str(shim.socket)))
        nursery.start_soon(shim.client.run)
        assert (await shim.call("State", id="c1")).status == 2
        assert (await shim.call("Connect", id="c1")).shim_pid == os.getpid()
        pids = (await shim.call("Pids", id="c1")).processes
        assert [process.pid for process in pids] == [PID]
        nursery.cancel_scope.cancel()


async def test_an_unknown_task_connects_without_error_and_has_no_pids(shim: Shim) -> None:
    assert (await shim.call("Connect", id="x")).task_pid == 0
    assert (await shim.fails("Pids", id="x")).code is Code.NOT_FOUND


async def test_a_size_asked_for_before_start_is_applied_at_start(shim: Shim) -> None:
    await shim.create(terminal=True)
    await shim.call("ResizePty", id="c1", width=100, height=30)
    assert shim.container().init.sizes == []
    await shim.call("Start", id="c1")
    assert shim.container().init.sizes == [(100, 30)]


async def test_out_of_memory_is_announced_and_counted_after_the_exit(shim: Shim) -> None:
    container = await shim.run()
    container.counters = StatsContainerResponse()
    await shim.sandboxes[0].oom_send.send("c1")
    await shim.wait_events(3)
    container.init.end(137)
    await shim.call("Wait", id="c1")
    container.counters = None
    stats = (await shim.call("Stats", id="c1")).stats
    assert stats.type_url.startswith("io.containerd.cgroups.v")
    topics = await shim.wait_events(4)
    assert topics[-2:] == ["/tasks/oom", "/tasks/exit"]


async def test_a_kill_for_want_of_memory_is_told_before_the_exit_though_the_guest_tells_it_later(
    shim: Shim,
) -> None:
    """The guest's word came by a call of its own, which the exit could overtake."""
    container = await shim.run()
    container.counters = StatsContainerResponse()
    container.counters.cgroup_stats.memory_stats.stats["oom_kill"] = 1
    container.init.end(137)
    await shim.call("Wait", id="c1")
    await shim.sandboxes[0].oom_send.send("c1")
    await shim.call("Delete", id="c1")
    topics = await shim.wait_events(5)
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit", "/tasks/delete"]


async def test_a_pods_containers_share_the_sandbox_and_end_with_it(shim: Shim) -> None:
    pod = {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "p1"}
    inside = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p1"}
    await shim.run("p1", annotations=pod)
    await shim.run("c1", annotations=inside)
    await shim.create("c2", annotations=inside)
    assert len(shim.sandboxes) == 1
    await shim.call("Kill", id="p1", signal=9)
    for task_id in ("p1", "c1", "c2"):
        assert (await shim.call("Wait", id=task_id)).exit_status == 137
    for task_id in ("c1", "c2"):
        await shim.call("Delete", id=task_id)
        assert shim.container(task_id).deleted == 1
    assert shim.sandboxes[0].open
    await shim.call("Delete", id="p1")
    assert shim.container("p1").deleted == 0, "it went with the VM: removing it from the guest costs time"
    assert not shim.sandboxes[0].open


async def test_a_pods_container_without_its_sandbox_is_not_found(shim: Shim) -> None:
    inside = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p1"}
    error = await shim.fails("Create", id="c1", bundle=shim.bundle("c1", annotations=inside))
    assert error.code is Code.NOT_FOUND
    assert shim.sandboxes == []


async def test_update_wants_resources_and_checkpoint_is_not_there(shim: Shim) -> None:
    container = await shim.run()
    resources = AnyMessage(type_url="types.containerd.io/x/LinuxResources", value=b'{"cpu": {"shares": 2}}')
    await shim.call("Update", id="c1", resources=resources)
    assert container.resources == [{"cpu": {"shares": 2}}]
    resources.type_url = "WindowsResources"
    assert (await shim.fails("Update", id="c1", resources=resources)).code is Code.INVALID_ARGUMENT
    assert (await shim.fails("Checkpoint", id="c1")).code is Code.UNIMPLEMENTED


async def test_a_start_that_fails_leaves_the_task_deletable(shim: Shim) -> None:
    await shim.create()

    async def refuse(process: FakeProcess) -> None:
        raise WrongState("not now")

    shim.sandboxes[0].start_hook = refuse
    assert (await shim.fails("Start", id="c1")).code is Code.FAILED_PRECONDITION
    assert (await shim.call("State", id="c1")).status == 1
    await shim.call("Delete", id="c1")
    assert await shim.wait_events(3) == ["/tasks/create", "/tasks/exit", "/tasks/delete"]


async def test_a_signal_to_the_shim_is_obeyed_although_nobody_reads_the_output(shim: Shim) -> None:
    out = shim.bundles / "out"
    os.mkfifo(out)
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    await shim.create(stdout=str(out))
    send, shim.container().init.stdout = trio.testing.memory_stream_one_way_pair()
    await send.send_all(bytes(4 << 20))
    await shim.call("Start", id="c1")
    os.kill(os.getpid(), 15)
    with trio.fail_after(10):
        await shim.ended.wait()
    os.close(reader)
    assert await shim.wait_events(3) == ["/tasks/create", "/tasks/start", "/tasks/exit"]


async def test_an_exec_whose_end_was_only_supposed_can_be_deleted(shim: Shim) -> None:
    container = await shim.run()
    process = await shim.exec("e1")
    process.dies_of = set()
    container.init.end(0)
    await shim.call("Wait", id="c1")

    def refuse(exec_id: str) -> None:
        raise WrongState("it is running")

    container.forget_exec = refuse  # type: ignore[method-assign]
    await shim.call("Delete", id="c1", exec_id="e1")
    assert (await shim.fails("State", id="c1", exec_id="e1")).code is Code.NOT_FOUND


async def test_a_vm_that_dies_during_a_start_leaves_no_start_after_the_exit(shim: Shim) -> None:
    async def die(process: FakeProcess) -> None:
        shim.sandboxes[0].gone.set()
        await trio.testing.wait_all_tasks_blocked(0.01)

    await shim.create()
    shim.sandboxes[0].start_hook = die
    assert (await shim.fails("Start", id="c1")).code is Code.INTERNAL
    assert (await shim.call("Wait", id="c1")).exit_status == 137
    await shim.call("Delete", id="c1")
    assert await shim.wait_events(3) == ["/tasks/create", "/tasks/exit", "/tasks/delete"]


async def test_a_signal_to_the_shim_ends_the_processes_and_says_so(shim: Shim) -> None:
    await shim.run()
    os.kill(os.getpid(), 15)
    with trio.fail_after(10):
        await shim.ended.wait()
    assert await shim.wait_events(3) == ["/tasks/create", "/tasks/start", "/tasks/exit"]
    assert shim.events[-1][1].exit_status == 137
    assert not shim.sandboxes[0].open


async def test_a_shim_that_nobody_wants_anything_of_ends(autojump_clock: trio.testing.MockClock) -> None:
    """containerd died between its start and the Create, and nothing else would ever end the process."""
    stop = trio.Event()
    started = trio.current_time()
    await serve.Connections(Server(), lambda: False, is_wanted=lambda: True).watch_idle(stop)
    assert stop.is_set()
    assert trio.current_time() - started == pytest.approx(serve.IDLE_LIMIT)


async def test_a_shim_with_a_task_waits_for_its_containerd_for_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.move_on_after(1000 * serve.IDLE_LIMIT) as scope:
        await serve.Connections(Server(), lambda: True, is_wanted=lambda: True).watch_idle(trio.Event())
    assert scope.cancelled_caught


def test_only_the_user_that_the_shim_runs_as_may_connect() -> None:
    uid, gid = os.geteuid(), os.getegid()
    assert serve.is_same_user(PeerCredentials(1, uid, gid))
    assert not serve.is_same_user(PeerCredentials(1, uid + 1, gid))
    assert not serve.is_same_user(PeerCredentials(1, uid, gid + 1))
