"""From exceptions to status codes: the only place of the shim that knows both sides.

containerd reads the code, and its clients the text, so the text of the guest is kept as it is. Whatever is
not in the table is a bug: the RPC server logs it with its traceback and answers UNKNOWN, which therefore
nothing foreseen may use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shim.bundle import BundleError
from ttrpc.status import Code, Status, StatusError
from vc import errors as vc

CODES: Mapping[type[BaseException], Code] = {
    vc.InvalidArgument: Code.INVALID_ARGUMENT,
    vc.NotFound: Code.NOT_FOUND,
    vc.AlreadyExists: Code.ALREADY_EXISTS,
    vc.WrongState: Code.FAILED_PRECONDITION,
    vc.Unsupported: Code.UNIMPLEMENTED,
    vc.Timeout: Code.DEADLINE_EXCEEDED,
    # GuestGone among them, and not UNAVAILABLE: containerd's CRI plugin would take the task for gone then.
    vc.VCError: Code.INTERNAL,
    BundleError: Code.INVALID_ARGUMENT,
}
# What containerd's own errors of a class end with; clients that see the text alone look for it.
SUFFIXES: Mapping[int, str] = {
    Code.NOT_FOUND: "not found",
    Code.ALREADY_EXISTS: "already exists",
    Code.FAILED_PRECONDITION: "failed precondition",
    Code.INVALID_ARGUMENT: "invalid argument",
    Code.UNIMPLEMENTED: "not implemented",
}


def leaves(exc: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in a group, or the exception itself."""
    if isinstance(exc, BaseExceptionGroup):
        for part in exc.exceptions:
            yield from leaves(part)
    else:
        yield exc


def status_of(exc: BaseException) -> Status:
    """Return what a call that failed so answers."""
    for leaf in leaves(exc):
        if isinstance(leaf, StatusError):
            return leaf.status
        for cls in type(leaf).__mro__:
            if cls in CODES:
                return Status(CODES[cls], _text(leaf, CODES[cls]))
    return Status(Code.UNKNOWN, f"{type(exc).__name__}: {exc}")


def _text(exc: BaseException, code: Code) -> str:
    text, suffix = str(exc), SUFFIXES.get(code, "")
    return f"{text}: {suffix}" if suffix and not text.endswith(suffix) else text
