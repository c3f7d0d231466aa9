"""Whatever a guest prints, what we keep is bounded and harmless."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vc.hypervisor.console import MAX_LINE_BYTES, ConsoleTail, printable


def test_lines_are_cut_at_newlines_wherever_the_bytes_are_cut() -> None:
    whole, bytewise = ConsoleTail(), ConsoleTail()
    data = b"first\r\nsecond\n\nthird"
    whole.feed(data)
    for byte in data:
        bytewise.feed(bytes([byte]))
    assert whole.lines() == bytewise.lines() == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS\x1b]0;owned\x07\x1b]8;;x\x1b\\!", "SeaBIOS!"),
        (b"cut short\x1b[3", "cut short\\x1b[3"),
        (b"bell\x07 back\x08space", "bell\\x07 back\\x08space"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("safe\u202eevil\u2066".encode(), "safe\\u202eevil\\u2066"),
        ("\x9b31m".encode(), "\\x9b31m"),
        (b"over\rwrite", "over\\rwrite"),
        (b"a\tb", "a    b"),
        ("größe".encode(), "größe"),
        (b"\x00", "\\x00"),
    ],
)
def test_what_could_harm_a_terminal_is_escaped(data: bytes, shown: str) -> None:
    assert printable(data) == shown


@given(st.lists(st.binary(max_size=2000), max_size=30))
def test_any_bytes_give_printable_lines_within_the_bounds(pieces: list[bytes]) -> None:
    tail = ConsoleTail(max_lines=5, max_bytes=2000)
    for piece in pieces:
        tail.feed(piece)
        lines = tail.lines()
        assert len(lines) <= 6
        assert all(line.isprintable() for line in lines)
        # An escape is at most six characters for what was one byte.
        assert sum(map(len, lines)) <= 6 * (2000 + MAX_LINE_BYTES)


def test_the_last_lines_are_the_ones_that_stay() -> None:
    tail = ConsoleTail(max_lines=3)
    tail.feed(b"".join(b"line %d\n" % number for number in range(100)))
    assert tail.lines() == ["line 97", "line 98", "line 99"]
    assert tail.last(2) == "line 98 | line 99"


def test_a_line_without_end_is_cut_and_does_not_grow() -> None:
    tail = ConsoleTail(max_lines=2, max_bytes=10_000)
    for _ in range(1000):
        tail.feed(b"x" * 1000)
    assert all(len(line) <= MAX_LINE_BYTES for line in tail.lines())
    assert len(tail.lines()) <= 3


def test_each_line_is_told_once_and_only_when_it_is_complete() -> None:
    told: list[str] = []
    tail = ConsoleTail(on_line=told.append)
    tail.feed(b"one\ntw")
    assert told == ["one"]
    tail.feed(b"o\n")
    assert told == ["one", "two"]
