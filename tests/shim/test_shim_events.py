"""Events reach containerd once and in order, whatever containerd does meanwhile."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from google.protobuf.empty_pb2 import Empty

from protos.containerd import events_pb2, ttrpc_events_pb2
from shim import events
from shim.events import Publisher
from ttrpc.server import Context, Server
from ttrpc.status import Code, StatusError

SERVICE = ttrpc_events_pb2.DESCRIPTOR.services_by_name["Events"]


class Containerd:
    """The event service on a socket that can go away and come back."""

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self.path = path
        self.got: list[str] = []
        self.envelopes: list[Any] = []
        self.refuse: Code | None = None
        self.hang_up = False  # instead of the next answer
        self.came = trio.Event()
        self._nursery = nursery
        self._scope = trio.CancelScope()

    async def forward(self, request: ttrpc_events_pb2.ForwardRequest, context: Context) -> Empty:
        if self.refuse is not None:
            self.came.set()
            raise StatusError(self.refuse, "not now")
        self.envelopes.append(request.envelope)
        event = events_pb2.TaskStart.FromString(request.envelope.event.value)
        self.got.append(event.container_id)
        self.came.set()
        if self.hang_up:
            self._scope.cancel()
            await trio.sleep_forever()
        return Empty()

    async def up(self) -> None:
        server = Server()
        server.add_service(SERVICE, self)
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(self.path))
        sock.listen()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        self._scope = trio.CancelScope()

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            with self._scope:
                await server.serve_listeners([listener], task_status=task_status)

        await self._nursery.start(serve)

    async def down(self) -> None:
        self._scope.cancel()
        self.path.unlink()
        await trio.testing.wait_all_tasks_blocked(0.01)

    async def wait_for(self, count: int) -> list[str]:
        with trio.fail_after(20):
            while len(self.got) < count:
                self.came = trio.Event()
                await self.came.wait()
        return self.got


def publish(publisher: Publisher, *names: str) -> None:
    for name in names:
        publisher.publish("/tasks/start", events_pb2.TaskStart(container_id=name, pid=1))


@pytest.fixture
def containerd(tmp_path: Path, nursery: trio.Nursery) -> Containerd:
    return Containerd(tmp_path / "events", nursery)


@pytest.fixture
async def publisher(containerd: Containerd, nursery: trio.Nursery) -> Publisher:
    publisher = Publisher(str(containerd.path), "ns")
    nursery.start_soon(publisher.run)
    return publisher


async def test_an_envelope_is_what_containerd_checks(containerd: Containerd, publisher: Publisher) -> None:
    await containerd.up()
    publish(publisher, "c1")
    await containerd.wait_for(1)
    envelope = containerd.envelopes[0]
    assert (envelope.topic, envelope.namespace) == ("/tasks/start", "ns")
    assert envelope.event.type_url == "containerd.events.TaskStart"
    assert envelope.timestamp.seconds > 1_700_000_000


async def test_events_wait_for_containerd_and_come_in_order(
    containerd: Containerd, publisher: Publisher
) -> None:
    publish(publisher, "1", "2")
    await trio.testing.wait_all_tasks_blocked(0.01)
    await containerd.up()
    publish(publisher, "3")
    assert await containerd.wait_for(3) == ["1", "2", "3"]


async def test_a_restart_of_containerd_loses_and_repeats_nothing(
    containerd: Containerd, publisher: Publisher
) -> None:
    await containerd.up()
    publish(publisher, "1", "2")
    await publisher.drain(20)  # the answers, too: an event without one has to be sent again
    await containerd.down()
    publish(publisher, "3", "4")
    await trio.testing.wait_all_tasks_blocked(0.01)
    await containerd.up()
    publish(publisher, "5")
    assert await containerd.wait_for(5) == ["1", "2", "3", "4", "5"]


async def test_an_event_whose_answer_is_lost_comes_again_in_its_place_and_unchanged(
    containerd: Containerd, publisher: Publisher
) -> None:
    await containerd.up()
    containerd.hang_up = True
    publish(publisher, "1", "2")
    assert await containerd.wait_for(1) == ["1"]
    await containerd.down()
    containerd.hang_up = False
    await containerd.up()
    assert await containerd.wait_for(3) == ["1", "1", "2"]
    assert containerd.envelopes[0] == containerd.envelopes[1]


async def test_an_event_that_is_refused_for_good_does_not_hold_up_the_next(
    containerd: Containerd, publisher: Publisher
) -> None:
    await containerd.up()
    containerd.refuse = Code.INVALID_ARGUMENT
    publish(publisher, "bad")
    await containerd.came.wait()
    await publisher.drain(10)
    containerd.refuse = None
    publish(publisher, "good")
    assert await containerd.wait_for(1) == ["good"]


async def test_an_event_that_is_refused_for_now_is_sent_again(
    containerd: Containerd, publisher: Publisher
) -> None:
    await containerd.up()
    containerd.refuse = Code.UNAVAILABLE
    publish(publisher, "1", "2")
    await containerd.came.wait()
    containerd.refuse = None
    assert await containerd.wait_for(2) == ["1", "2"]


async def test_drain_returns_when_everything_has_left(containerd: Containerd, publisher: Publisher) -> None:
    await containerd.up()
    publish(publisher, *map(str, range(100)))
    with trio.fail_after(20):
        await publisher.drain(1000)
    assert containerd.got == [str(number) for number in range(100)]


async def test_drain_gives_up_in_time(
    publisher: Publisher, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    publish(publisher, "1")
    started = trio.current_time()
    await publisher.drain(2)
    assert trio.current_time() - started == pytest.approx(2)
    assert "1 events could not be sent" in caplog.text


async def test_nobody_listens_where_there_is_no_address(nursery: trio.Nursery) -> None:
    publisher = Publisher("", "ns")
    nursery.start_soon(publisher.run)
    publish(publisher, "1")
    with trio.fail_after(10):
        await publisher.drain(1000)


async def test_the_queue_is_bounded_and_loses_the_oldest(
    containerd: Containerd, publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    publish(publisher, *map(str, range(events.QUEUE_LIMIT + 3)))
    await containerd.up()
    got = await containerd.wait_for(events.QUEUE_LIMIT)
    assert (got[0], got[-1]) == ("3", str(events.QUEUE_LIMIT + 2))
    assert caplog.text.count("is lost") == 3


async def test_an_event_that_nobody_takes_for_long_is_given_up(
    publisher: Publisher, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    publish(publisher, "1")
    await publisher.drain(10 * events.LIFETIME)
    assert trio.current_time() >= events.LIFETIME
    assert "did not take the event" in caplog.text
