"""The last lines that a guest or a VMM wrote, made harmless.

The rule: whatever comes, memory is bounded, and what `lines` gives can be shown on a terminal and written
into a log. The guest is hostile, and its console ends up in front of an administrator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from vc.words import printable

MAX_LINES = 200
MAX_BYTES = 32 * 1024  # of raw text that is kept
MAX_LINE_BYTES = 512  # a longer line is cut into several


class ConsoleTail:
    """The tail of a stream of lines. `on_line` is called with each line, sanitised, when it is complete."""

    def __init__(
        self,
        *,
        max_lines: int = MAX_LINES,
        max_bytes: int = MAX_BYTES,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._on_line = on_line
        self._lines: deque[bytes] = deque()
        self._size_bytes = 0
        self._partial = b""

    def feed(self, data: bytes) -> None:
        """Take what was written."""
        *complete, rest = (self._partial + data).split(b"\n")
        for line in complete:
            self._add(line)
        while len(rest) >= MAX_LINE_BYTES:
            self._add(rest[:MAX_LINE_BYTES])
            rest = rest[MAX_LINE_BYTES:]
        self._partial = rest

    def _add(self, line: bytes) -> None:
        line = line.rstrip(b"\r")
        pieces = [line[i : i + MAX_LINE_BYTES] for i in range(0, len(line), MAX_LINE_BYTES)] or [b""]
        for piece in pieces:
            self._lines.append(piece)
            self._size_bytes += len(piece)
            if self._on_line is not None:
                self._on_line(printable(piece))
        while len(self._lines) > self._max_lines or self._size_bytes > self._max_bytes:
            self._size_bytes -= len(self._lines.popleft())

    def lines(self) -> list[str]:
        """Return the last lines, the unfinished one included, without empty ones."""
        raw = [*self._lines, self._partial]
        return [printable(line) for line in raw if line.strip()]

    def last(self, count: int) -> str:
        """Return the last lines on one line, for the end of an error message."""
        return " | ".join(line.strip() for line in self.lines()[-count:])
