"""What can go wrong in the VM library, as one tree.

A class exists because some caller handles it differently from the others; its docstring says who. Anything
that is not a `VCError` is a bug of ours. Messages name the thing, its value, the cause and what to do, on one
line; nobody matches on their text.
"""

from __future__ import annotations


class VCError(Exception):
    """Any failure that this library foresees. The shim answers it with its text, without a traceback."""


class InvalidArgument(VCError):
    """A request, a configuration file or an annotation makes no sense; trying it again is useless."""


class NotFound(VCError):
    """The sandbox, container, process or device does not exist. Deleting and killing take it for success."""


class AlreadyExists(VCError):
    """The id is taken. A caller that repeats a create must not clean up what the first one made."""


class WrongState(VCError):
    """The thing exists, but not in a state that allows the operation (a failed precondition)."""


class GuestGone(VCError):
    """The VM died or its agent cannot be reached; the text says why and ends with the console's tail.

    Whoever waits for a process takes it for exit status 137; clean-up skips every step that needs the guest.
    """


class Unsupported(VCError):
    """It makes sense, but this host, this configuration or this agent cannot do it at all."""


class HypervisorError(VCError):
    """The VMM, virtiofsd or the driver failed; the sandbox's owner tears the sandbox down."""


class NotRestored(HypervisorError):
    """A machine was there, but no VM came out of the state that was loaded into it: that may be to blame."""


class AgentError(VCError):
    """The guest's agent refused a call, with a status code; the VM is fine and goes on.

    Stop and kill read `code` to tell "already gone" from a real failure. `text` comes from the guest,
    so it is untrusted: it may be shown, never interpreted.
    """

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(text or f"{call} failed in the guest with status code {code} and without a reason")
        self.call = call
        self.code = code
        self.text = text


class Timeout(VCError):
    """A bounded wait ran out, and the other side may still do it later: a late success has to be undone."""
