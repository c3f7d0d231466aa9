"""The queue of received bytes: order, sizes, and what small pieces cost."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from yamux.buffer import ByteQueue

PIECES = st.one_of(
    st.binary(max_size=5), st.integers(0, 10000).map(lambda n: bytes(i % 251 for i in range(n)))
)


@given(st.lists(st.one_of(PIECES, st.integers(1, 12000), st.none()), max_size=30))
def test_bytes_come_out_in_order_and_in_no_larger_pieces_than_asked(steps: list[bytes | int | None]) -> None:
    queue, model = ByteQueue(), b""
    for step in steps:
        if isinstance(step, bytes):
            queue.append(step)
            model += step
        else:
            taken = queue.take(step)
            assert model.startswith(taken)
            assert bool(taken) is bool(model)
            assert step is None or len(taken) <= step
            model = model[len(taken) :]
        assert len(queue) == len(model)
    while taken := queue.take():
        assert model.startswith(taken)
        model = model[len(taken) :]
    assert not model


def test_a_peer_that_sends_single_bytes_costs_about_as_much_as_one_that_does_not() -> None:
    queue = ByteQueue()
    for _ in range(1 << 18):
        queue.append(b"x")
    assert sum(map(sys.getsizeof, queue._pieces)) < 1.2 * (1 << 18)


def test_a_large_piece_is_not_copied() -> None:
    queue, piece = ByteQueue(), bytes(65536)
    queue.append(piece)
    assert queue.take() is piece


def test_a_cleared_queue_is_as_new() -> None:
    queue = ByteQueue()
    queue.append(b"abc")
    queue.take(1)
    queue.clear()
    assert len(queue) == 0
    queue.append(b"def")
    assert queue.take() == b"def"
