"""Events on their way to containerd: one bounded queue, one sender, strictly first in, first out.

That alone gives the order that clients rely on (create, start, exit, delete; an exec's exit before init's).
When containerd is away the sender stays at the head and tries again: overtaking would lose the order, and
giving up the event. An event that containerd refuses is dropped, since it would be refused for ever.

Each is sent once, with one exception: if the connection ends, or the time, between an event and its answer,
nobody here knows whether it was heard. Then it comes again, unchanged to its last byte and in its place:
a repeated exit harms nobody, a lost one is waited for in vain. The reference shim does so, too.
"""

from __future__ import annotations

import logging
import time
from collections import deque

import trio
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from protos.containerd import ttrpc_events_pb2
from protos.containerd.ttrpc_events_pb2 import ForwardRequest
from protos.containerd.types_pb2 import Envelope
from ttrpc import methods
from ttrpc.client import Client, ConnectionClosed
from ttrpc.status import Code, StatusError

log = logging.getLogger(__name__)

FORWARD = methods.method(
    ttrpc_events_pb2.DESCRIPTOR.services_by_name["Events"], "Forward", ForwardRequest, Empty
)
QUEUE_LIMIT = 2048  # events, as in the reference shim
CALL_TIMEOUT = 5.0  # seconds for connecting and for a call, as in the reference shim
FIRST_DELAY, LAST_DELAY = 0.1, 5.0  # seconds between tries, doubling
LIFETIME = 600.0  # seconds: clients that missed an event for longer have asked for the state long since
TRANSIENT = (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED)


class Publisher:
    """The queue. `publish` may be called at any time; `run` sends until cancelled."""

    def __init__(self, address: str, namespace: str) -> None:
        """`address` is the path of containerd's ttrpc socket; empty (CRI-O) means that nobody listens."""
        self._address = address
        self._namespace = namespace
        self._queue: deque[tuple[Envelope, float]] = deque()
        self._work = trio.Event()
        self._empty = trio.Event()
        self._empty.set()

    def publish(self, topic: str, event: Message) -> None:
        """Queue an event. Never blocks; when full, the oldest is lost."""
        log.debug("event %s: %s", topic, event)
        if not self._address:
            return
        envelope = Envelope(namespace=self._namespace, topic=topic)
        envelope.timestamp.FromNanoseconds(time.time_ns())
        # The bare name: older daemons compare it as it is, so "type.googleapis.com/" must not be in front.
        envelope.event.type_url = event.DESCRIPTOR.full_name
        envelope.event.value = event.SerializeToString()
        if len(self._queue) >= QUEUE_LIMIT:
            lost, _ = self._queue.popleft()
            log.warning("more than %d events wait for containerd: %s is lost", QUEUE_LIMIT, lost.topic)
        self._queue.append((envelope, trio.current_time() + LIFETIME))
        self._work.set()
        if self._empty.is_set():
            self._empty = trio.Event()

    async def drain(self, timeout: float) -> None:
        """Wait until all events have left, at most `timeout` seconds."""
        with trio.move_on_after(timeout):
            await self._empty.wait()
        if self._queue:
            log.warning("%d events could not be sent to %s", len(self._queue), self._address)

    async def run(self) -> None:
        """Send what is queued; a connection is made when there is something to send, and kept."""
        delay = FIRST_DELAY
        while True:
            await self._wait_for_work()
            try:
                with trio.fail_after(CALL_TIMEOUT):
                    stream = await trio.open_unix_socket(self._address)
            except (OSError, trio.TooSlowError) as exc:
                log.debug("containerd's event socket %s: %s", self._address, exc)
            else:
                async with trio.open_nursery() as nursery:
                    client = Client(stream)
                    nursery.start_soon(client.run)
                    if await self._send_all(client):
                        delay = FIRST_DELAY
                    nursery.cancel_scope.cancel()
            self._drop_expired()
            if self._queue:
                await trio.sleep(delay)
                delay = min(2 * delay, LAST_DELAY)

    async def _wait_for_work(self) -> None:
        while not self._queue:
            self._work = trio.Event()
            await self._work.wait()

    async def _send_all(self, client: Client) -> bool:
        """Send until the connection fails; say whether it did anything at all."""
        progress = False
        while not client.closed.is_set():
            if not self._queue:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_then_cancel, client.closed, nursery.cancel_scope)
                    await self._wait_for_work()
                    nursery.cancel_scope.cancel()
                continue
            entry = self._queue[0]
            if not await self._send(client, entry[0]):
                break
            progress = True
            if self._queue and self._queue[0] is entry:  # else it was pushed out while under way
                self._queue.popleft()
            if not self._queue:
                self._empty.set()
        return progress

    async def _send(self, client: Client, envelope: Envelope) -> bool:
        """Send one event; False if it is to be tried again on another connection."""
        try:
            await client.call(FORWARD, ForwardRequest(envelope=envelope), timeout=CALL_TIMEOUT)
        except ConnectionClosed:
            return False
        except StatusError as exc:
            if exc.code in TRANSIENT:
                return False
            log.error("containerd refused the event %s: %s", envelope.topic, exc)
        return True

    def _drop_expired(self) -> None:
        while self._queue and self._queue[0][1] < trio.current_time():
            envelope, _ = self._queue.popleft()
            log.error("containerd did not take the event %s within %d s", envelope.topic, LIFETIME)
        if not self._queue:
            self._empty.set()


async def _then_cancel(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
