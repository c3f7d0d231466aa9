"""What can go wrong on a connection, by whose fault it is.

Kept to itself and free of imports: the guest's agent loads this module at every boot.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers know the name; importing typing would cost more than this whole package
if TYPE_CHECKING:
    from yamux.events import Event


class LocalProtocolError(Exception):
    """We were about to break the protocol: a bug on this side. Nothing was sent and no state changed."""


class RemoteProtocolError(Exception):
    """The peer broke the protocol. The connection is over; what it still owes the peer is in the outbox.

    `events` holds what the same bytes had brought before the fault, in order.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.events: list[Event] = []
