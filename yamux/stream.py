"""One stream's life: which end may still send, as a table.

Each direction ends with a FIN of its sender, and the stream is over when both have. A RST ends everything at
once. The table has no row for a move that the protocol forbids; whose fault that is, the connection knows.
"""

from __future__ import annotations

from yamux.window import ReceiveWindow, SendWindow

OPEN = "open"
LOCAL_ENDED = "local ended"  # we sent FIN, the peer still sends
REMOTE_ENDED = "remote ended"  # the peer sent FIN, we may still send
CLOSED = "closed"

SEND_FIN = "send FIN"
RECEIVE_FIN = "receive FIN"

MOVES = {
    (OPEN, SEND_FIN): LOCAL_ENDED,
    (OPEN, RECEIVE_FIN): REMOTE_ENDED,
    (LOCAL_ENDED, RECEIVE_FIN): CLOSED,
    (REMOTE_ENDED, SEND_FIN): CLOSED,
}


class StreamState:
    """What the connection remembers of one live stream."""

    __slots__ = ("acknowledged", "delivered", "ours", "receive_window", "send_window", "state")

    def __init__(self, *, ours: bool, max_window: int) -> None:
        self.ours = ours
        self.state = OPEN
        # Ours: the peer has answered our SYN. Theirs: our application has accepted the stream.
        self.acknowledged = False
        self.send_window = SendWindow()
        self.receive_window = ReceiveWindow(max_window)
        self.delivered = 0  # bytes handed out in events and not yet reported as consumed

    @property
    def can_send(self) -> bool:
        """Whether we have not sent FIN."""
        return self.state is OPEN or self.state is REMOTE_ENDED

    @property
    def can_receive(self) -> bool:
        """Whether the peer has not sent FIN."""
        return self.state is OPEN or self.state is LOCAL_ENDED

    def move(self, what: str) -> bool:
        """Make a move of the table; False, and nothing changed, if the table forbids it."""
        new = MOVES.get((self.state, what))
        if new is None:
            return False
        self.state = new
        return True
