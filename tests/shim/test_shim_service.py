"""The serving process over a real socket, as containerd drives it; the sandbox below it is made of memory."""

from __future__ import annotations

import os
from typing import Any

import pytest
import trio
from google.protobuf.any_pb2 import Any as AnyMessage

from protos.containerd import task_v2_pb2, task_v3_pb2
from shim import bundle, serve
from tests.shim.pods import (
    EXEC_SPEC,
    PID,
    TASK,
    TASK_V3,
    FakeProcess,
    Gate,
    Shim,
    nothing,
)
from ttrpc.client import Client
from ttrpc.server import PeerCredentials
from ttrpc.status import Code, StatusError
from vc.errors import AgentError, WrongState


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


async def test_an_exit_is_noted_for_a_delete_that_comes_after_our_death(shim: Shim) -> None:
    container = await shim.run()
    await shim.exec("e1")
    container.execs["e1"].end(3)
    await shim.call("Wait", id="c1", exec_id="e1")
    assert bundle.read_exit(shim.bundle("c1")) is None
    container.init.end(5)
    at = (await shim.call("Wait", id="c1")).exited_at
    assert bundle.read_exit(shim.bundle("c1")) == (5, pytest.approx(at.ToNanoseconds() / 1e9, abs=1e-5))


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
    deleting = Gate()
    shim.sandboxes[0].end_hook = deleting
    async with trio.open_nursery() as nursery:
        other = Client(await trio.open_unix_socket(str(shim.socket)))
        nursery.start_soon(other.run)
        other.open_stream(TASK["Delete"], task_v2_pb2.DeleteRequest(id="c1"))
        await deleting.reached.wait()
        await other.aclose()
    deleting.opened.set()
    topics = await shim.wait_events(4)
    assert topics[-1] == "/tasks/delete"
    assert (await shim.fails("Delete", id="c1")).code is Code.NOT_FOUND


async def test_an_unknown_task_connects_without_error_and_has_no_pids(shim: Shim) -> None:
    assert (await shim.call("Connect", id="x")).task_pid == 0
    assert (await shim.fails("Pids", id="x")).code is Code.NOT_FOUND


async def test_a_size_asked_for_before_start_is_applied_at_start(shim: Shim) -> None:
    await shim.create(terminal=True)
    await shim.call("ResizePty", id="c1", width=100, height=30)
    assert shim.container().init.sizes == []
    await shim.call("Start", id="c1")
    assert shim.container().init.sizes == [(100, 30)]


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


def test_only_the_user_that_the_shim_runs_as_may_connect() -> None:
    uid, gid = os.geteuid(), os.getegid()
    assert serve.is_same_user(PeerCredentials(1, uid, gid))
    assert not serve.is_same_user(PeerCredentials(1, uid + 1, gid))
    assert not serve.is_same_user(PeerCredentials(1, uid, gid + 1))
