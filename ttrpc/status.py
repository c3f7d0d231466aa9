"""How a call ends: status codes, a code with its message, and the exception that carries both.

This module is part of the guest's start-up path: it imports nothing that protobuf does not import anyway.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Code(IntEnum):
    """Status codes, the same as gRPC's: google/rpc/code.proto."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Status:
    """A code and a text for people. Immutable by convention; equal and hashable by value.

    A code that has no name (peers may send any number) stays an int.
    """

    __slots__ = ("code", "message")
    __match_args__ = ("code", "message")

    def __init__(self, code: int, message: str = "") -> None:
        self.code: int
        try:
            self.code = Code(code)
        except ValueError:
            self.code = code
        self.message = message

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Status):
            return NotImplemented
        return self.code == other.code and self.message == other.message

    def __hash__(self) -> int:
        return hash((self.code, self.message))

    def __repr__(self) -> str:
        return f"Status({self.code!r}, {self.message!r})"

    def __str__(self) -> str:
        name = self.code.name if isinstance(self.code, Code) else f"status code {self.code}"
        return f"{name}: {self.message}" if self.message else name


class StatusError(Exception):
    """A call that ended with another status than OK; raised by a handler to end its call so."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code, message)
        self.status = Status(code, message)

    @property
    def code(self) -> int:
        """The status code: a `Code`, or a plain int if it has no name."""
        return self.status.code

    @property
    def message(self) -> str:
        """The text that came with the code."""
        return self.status.message

    def __str__(self) -> str:
        return str(self.status)


def leaves(exc: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions of a group, however deep; an exception that is no group yields itself."""
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from leaves(inner)
    else:
        yield exc


def status_of(exc: BaseException) -> Status | None:
    """Return the status that an exception carries: a StatusError's, also inside a group. Else None."""
    for leaf in leaves(exc):
        if isinstance(leaf, StatusError):
            return leaf.status
    return None


def unexpected(exc: BaseException) -> Status:
    """Return the status for an exception that nobody foresaw: UNKNOWN, and what it says."""
    text = str(exc)
    return Status(Code.UNKNOWN, f"{type(exc).__name__}: {text}" if text else type(exc).__name__)
