"""What can go wrong in the guest, and the one place that says which status code a caller sees for it.

Texts keep the words that shims of the Kata family look for: "InvalidContainerId", "InvalidExecId", "Link
not found", and whatever crun says about a program that cannot be started. Codes are chosen for callers that
compare codes.
"""

from __future__ import annotations

from ttrpc.status import Code, Status, StatusError


class AgentError(Exception):
    """Base of the failures that a caller may see; the text is for the caller."""


class InvalidArgument(AgentError):
    """The request itself makes no sense."""


class NotFound(AgentError):
    """The thing that the request names is not there."""


class AlreadyExists(AgentError):
    """The name is taken."""


class WrongState(AgentError):
    """The thing is there, but not in a state that allows this."""


class Unsupported(AgentError):
    """This guest cannot do it."""


class NoTerminal(AgentError):
    """A terminal operation on a process without one."""


class RuntimeFailed(AgentError):
    """A program that we ran in the guest (crun, mount) failed; the text is what it said."""


# Kata's agent answers INTERNAL to whatever went wrong while doing what was asked.
_CODES: dict[type[BaseException], Code] = {
    InvalidArgument: Code.INVALID_ARGUMENT,
    NotFound: Code.NOT_FOUND,
    AlreadyExists: Code.ALREADY_EXISTS,
    WrongState: Code.FAILED_PRECONDITION,
    Unsupported: Code.UNIMPLEMENTED,
    NoTerminal: Code.UNAVAILABLE,
    RuntimeFailed: Code.INTERNAL,
    OSError: Code.INTERNAL,
}


def no_container(container_id: str) -> NotFound:
    """Return the error for a container id that nobody created."""
    return NotFound(f'InvalidContainerId: container "{container_id}" not found')


def no_exec(container_id: str, exec_id: str) -> NotFound:
    """Return the error for an exec id that nobody created, or whose process is gone for long."""
    return NotFound(f'InvalidExecId: exec "{exec_id}" of container "{container_id}" not found')


def is_expected(exc: BaseException) -> bool:
    """Tell whether the failure is one of ours or the system's, and no bug that deserves a traceback."""
    return isinstance(exc, (AgentError, OSError, StatusError))


def status_of(exc: BaseException) -> Status:
    """Return the status that a caller gets for this exception."""
    if isinstance(exc, StatusError):
        return exc.status
    for cls in type(exc).__mro__:
        if cls in _CODES:
            return Status(_CODES[cls], str(exc))
    return Status(Code.INTERNAL, f"{type(exc).__name__}: {exc}")
