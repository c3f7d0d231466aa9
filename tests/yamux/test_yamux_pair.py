"""Two connections joined in memory, and a model of what their streams should do."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from yamux.connection import Connection
from yamux.events import DataReceived, StreamEnded, StreamOpened, StreamReset

WINDOWS = st.sampled_from([256 * 1024, 300_000, 1 << 20])
SIZES = st.one_of(st.integers(1, 40), st.integers(1, 1 << 18))


@dataclass
class Direction:
    """What one end sent on one stream, and how far it got."""

    sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)
    consumed: int = 0
    ended: bool = False
    end_seen: bool = False


class Pair(RuleBasedStateMachine):
    """Both ends at once, with lines between them that hold bytes for as long as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = (256 * 1024, 256 * 1024)
        self.ends: list[Connection] = []
        self.lines = [bytearray(), bytearray()]  # towards the other end, by sender
        # By sender; a stream of which either end sent a reset is no longer followed
        self.directions: list[dict[int, Direction]] = [{}, {}]
        self.waiting: list[list[int]] = [[], []]  # announced and not accepted
        self.reset: set[int] = set()
        self.salt = 0

    @precondition(lambda self: not self.ends)
    @rule(left=WINDOWS, right=WINDOWS)
    def start(self, left: int, right: int) -> None:
        self.windows = (left, right)
        self.ends = [Connection(client=True, max_window=left), Connection(client=False, max_window=right)]

    def usable(self, end: int) -> list[int]:
        """Streams on which this end may act: opened by it, or accepted."""
        return [i for i in self.directions[end] if i not in self.waiting[end] and i not in self.reset]

    def pick(self, data: st.DataObject, ids: list[int]) -> int | None:
        return data.draw(st.sampled_from(sorted(ids))) if ids else None

    @precondition(lambda self: self.ends)
    @rule(end=st.integers(0, 1))
    def open(self, end: int) -> None:
        stream_id = self.ends[end].open_stream()
        assert stream_id % 2 == 1 - end
        assert stream_id not in self.directions[end]
        self.directions[end][stream_id] = Direction()

    @precondition(lambda self: self.ends)
    @rule(end=st.integers(0, 1))
    def accept(self, end: int) -> None:
        if self.waiting[end]:
            self.ends[end].accept_stream(self.waiting[end].pop(0))

    @precondition(lambda self: self.ends)
    @rule(end=st.integers(0, 1), size=SIZES, joined=st.booleans(), data=st.data())
    def send(self, end: int, size: int, joined: bool, data: st.DataObject) -> None:
        ids = [i for i in self.usable(end) if not self.directions[end][i].ended]
        stream_id = self.pick(data, ids)
        if stream_id is None:
            return
        size = min(size, self.ends[end].send_credit(stream_id))
        if not size:
            return
        self.salt += 1
        body = (self.salt.to_bytes(4, "big") * (size // 4 + 1))[:size]
        if joined:
            self.ends[end].send_data(stream_id, body)
        else:
            self.lines[end] += self.ends[end].data_header(stream_id, size)
            self.lines[end] += body
        self.directions[end][stream_id].sent += body

    @precondition(lambda self: self.ends)
    @rule(end=st.integers(0, 1), data=st.data())
    def end_stream(self, end: int, data: st.DataObject) -> None:
        stream_id = self.pick(data, [i for i in self.usable(end) if not self.directions[end][i].ended])
        if stream_id is not None:
            self.ends[end].end_stream(stream_id)
            self.directions[end][stream_id].ended = True

    @precondition(lambda self: self.ends)
    @rule(end=st.integers(0, 1), data=st.data())
    def reset_stream(self, end: int, data: st.DataObject) -> None:
        stream_id = self.pick(data, list(self.directions[end]))
        if stream_id is not None:
            self.ends[end].reset_stream(stream_id)
            assert not self.ends[end].is_live(stream_id)
            self.reset.add(stream_id)
            for waiting in self.waiting:
                if stream_id in waiting:
                    waiting.remove(stream_id)
            self.stop_following_unseen(end, stream_id)

    def stop_following_unseen(self, end: int, stream_id: int) -> None:
        """The other end may not have heard of the stream yet: its SYN is still to come, then the reset."""
        self.directions[end].pop(stream_id)
        self.directions[1 - end].pop(stream_id, None)

    @precondition(lambda self: self.ends)
    @rule(end=st.integers(0, 1), part=st.integers(1, 100), data=st.data())
    def consume(self, end: int, part: int, data: st.DataObject) -> None:
        """Take a part, in percent, of what this end has got on one stream."""
        stream_id = self.pick(data, list(self.directions[end]))
        if stream_id is None or stream_id in self.waiting[end]:
            return
        arriving = self.directions[1 - end].get(stream_id)
        if arriving is not None:
            n = (len(arriving.received) - arriving.consumed) * part // 100
            self.ends[end].consumed(stream_id, n)
            arriving.consumed += n

    @precondition(lambda self: self.ends)
    @rule(end=st.integers(0, 1))
    def flush(self, end: int) -> None:
        self.lines[end] += self.ends[end].data_to_send()

    @precondition(lambda self: self.ends)
    @rule(end=st.integers(0, 1), size=st.one_of(st.integers(1, 30), st.just(1 << 30)))
    def deliver(self, end: int, size: int) -> None:
        """Carry bytes that `end` has sent to the other."""
        data = bytes(self.lines[end][:size])
        del self.lines[end][:size]
        other = 1 - end
        for event in self.ends[other].receive_data(data):
            if isinstance(event, StreamOpened):
                if event.stream_id not in self.reset:
                    self.waiting[other].append(event.stream_id)
                    self.directions[other][event.stream_id] = Direction()
            elif isinstance(event, DataReceived) and event.stream_id not in self.reset:
                self.arrived(self.directions[end][event.stream_id], event.data, self.windows[other])
            elif isinstance(event, StreamEnded) and event.stream_id not in self.reset:
                direction = self.directions[end][event.stream_id]
                assert direction.ended
                assert direction.received == direction.sent
                direction.end_seen = True
            elif isinstance(event, StreamReset):
                assert event.stream_id in self.reset

    def arrived(self, direction: Direction, data: bytes, window: int) -> None:
        start = len(direction.received)
        assert direction.sent[start : start + len(data)] == data
        direction.received += data
        assert not direction.end_seen
        assert len(direction.received) - direction.consumed <= window

    @invariant()
    def a_stream_is_forgotten_when_both_directions_have_ended_and_not_before(self) -> None:
        for end in range(len(self.ends)):
            for stream_id, direction in self.directions[end].items():
                other = self.directions[1 - end].get(stream_id)
                over = direction.ended and other is not None and other.end_seen
                assert self.ends[end].is_live(stream_id) is not over

    def teardown(self) -> None:
        """Whatever is under way arrives in the end, and a reader that reads gives all credit back."""
        if not self.ends:
            return
        for end in (0, 1, 0, 1):
            self.flush(end)
            self.deliver(end, 1 << 30)
        for end in (0, 1):
            for stream_id, direction in self.directions[end].items():
                assert direction.received == direction.sent
                assert direction.end_seen is direction.ended
                assert not self.ends[end].mid_frame
                if direction.ended or stream_id in self.waiting[0] + self.waiting[1]:
                    continue
                window = self.windows[1 - end]
                self.ends[1 - end].consumed(stream_id, len(direction.received) - direction.consumed)
                self.ends[end].receive_data(self.ends[1 - end].data_to_send())
                assert self.ends[end].send_credit(stream_id) > window // 2


TestPair = Pair.TestCase
TestPair.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
