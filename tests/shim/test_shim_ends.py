"""How a pod and its shim end, and that it is told: the guest dies, a signal comes, nobody calls any more."""

from __future__ import annotations

import os
import signal

import pytest
import trio

from protos.kata.agent_pb2 import StatsContainerResponse
from shim import serve
from tests.shim.pods import (
    EXEC_SPEC,
    PID,
    FakeProcess,
    Shim,
)
from ttrpc.client import Client
from ttrpc.server import Server
from ttrpc.status import Code


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


async def test_the_last_events_leave_though_delete_asks_the_shim_to_end_meanwhile(shim: Shim) -> None:
    """containerd runs `delete` as soon as Shutdown is answered, and that sends SIGTERM to who is still there.

    The event of the Delete was lost, if containerd was slow with the answers to those before.
    """
    asked, released = trio.Event(), trio.Event()

    async def hold(topic: str) -> None:
        if topic == "/tasks/exit":
            asked.set()
            await released.wait()

    shim.answer_hook = hold
    container = await shim.run()
    container.init.end(0)
    await shim.call("Wait", id="c1")
    await shim.call("Delete", id="c1")
    await asked.wait()
    await shim.call("Shutdown", id="c1")
    await shim.client.closed.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await trio.testing.wait_all_tasks_blocked(0.01)
    released.set()
    with trio.fail_after(10):
        await shim.ended.wait()
    topics = [topic for topic, _ in shim.events]
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


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


async def test_a_shim_whose_last_task_has_gone_does_not_wait_long_for_a_shutdown(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """containerd died in the middle of a Create or Delete, came back, and took the shim for a task."""
    stop, busy = trio.Event(), True
    connections = serve.Connections(Server(), lambda: busy, is_wanted=lambda: True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connections.watch_idle, stop)
        await trio.sleep(serve.IDLE_LIMIT)
        busy = False
        connections.note_unused()
        await trio.sleep(serve.SERVED_LIMIT - 1)
        busy = True  # by a further Create, which takes its time
        await trio.sleep(serve.IDLE_LIMIT)
        assert not stop.is_set()
        busy = False
        connections.note_unused()
        unused = trio.current_time()
        await stop.wait()
        assert trio.current_time() - unused == pytest.approx(serve.SERVED_LIMIT)


async def test_a_shim_ends_although_its_last_delete_was_never_followed_by_a_shutdown(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "SERVED_LIMIT", 0.1)
    container = await shim.run()
    container.init.end(0)
    await shim.call("Wait", id="c1")
    await shim.call("Delete", id="c1")
    with trio.fail_after(10):
        await shim.ended.wait()
