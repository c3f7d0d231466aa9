"""Credit of one direction of one stream. Both classes count in Python's integers, so nothing wraps.

The sender of a direction starts with 256 KiB of credit and spends it on bodies of Data frames. The receiver
gives credit back with WindowUpdate, for bytes that its application has taken, and not for bytes that merely
arrived: that is what bounds its memory. A receiver that wants more in flight announces the difference at the
start.
"""

from __future__ import annotations

from yamux.frames import INITIAL_WINDOW, MAX_UINT32


class SendWindow:
    """How much we may still send. `credit` is in bytes."""

    __slots__ = ("credit",)

    def __init__(self) -> None:
        self.credit = INITIAL_WINDOW

    def grant(self, delta: int) -> None:
        """Add credit that the peer gave. More than a length field can say is of no use and is not counted."""
        self.credit = min(self.credit + delta, MAX_UINT32)

    def spend(self, n: int) -> bool:
        """Take `n` bytes of credit; False, and nothing taken, if there is less."""
        if n > self.credit:
            return False
        self.credit -= n
        return True


class ReceiveWindow:
    """How much the peer may still send, and how much of it we owe back.

    maximum == credit + held + owed, once the opening announcement is made: the peer's unspent credit, the
    bytes it announced that the application has not taken, and the bytes taken but not given back yet.
    """

    __slots__ = ("credit", "held", "maximum", "owed")

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.credit = INITIAL_WINDOW
        self.held = 0
        self.owed = 0

    def announce(self) -> int:
        """Raise the peer's credit from the initial window to our maximum; returns the delta to send. Once."""
        delta = self.maximum - INITIAL_WINDOW
        self.credit += delta
        return delta

    def arrive(self, n: int) -> bool:
        """Count a frame of `n` bytes as soon as its header is there; False if it exceeds the credit."""
        if n > self.credit:
            return False
        self.credit -= n
        self.held += n
        return True

    def consume(self, n: int) -> int:
        """Count `n` bytes as taken by the application; returns the delta to send now, 0 for none yet.

        Credit goes back once it is half of the maximum, as in stream.go, sendWindowUpdate: an update per read
        would double the number of frames.
        """
        self.held -= n
        self.owed += n
        if self.owed < self.maximum // 2:
            return 0
        delta, self.owed = self.owed, 0
        self.credit += delta
        return delta
