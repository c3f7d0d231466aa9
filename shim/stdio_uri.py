"""What a client means by the strings in stdin, stdout and stderr. Pure.

    ""                        no stream
    /path, fifo:///path       a named pipe; without a scheme also an existing file, which is appended to
    file:///path              a log file, made if need be, its directories too; both outputs go to it
    binary:///path?k=v        a logging program, with k and v as arguments; both outputs go to it
    binary-v2:///path?k=v     the same, and it must say that it is ready

The scheme of stdout decides for stderr too. With a terminal there is no stderr, whatever its path says: some
clients give one, and nobody would ever open it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from urllib.parse import parse_qsl, unquote, urlsplit

from shim.tasks import Stdio
from vc.errors import InvalidArgument
from vc.process import StdioRequest


class Kind(Enum):
    """How an output is written to."""

    NONE = "none"
    FIFO = "fifo"
    PATH = "path"  # a fifo or an existing file: the path itself tells
    FILE = "file"
    BINARY = "binary"


SCHEMES = {
    "": Kind.PATH,
    "fifo": Kind.FIFO,
    "file": Kind.FILE,
    "binary": Kind.BINARY,
    "binary-v2": Kind.BINARY,
}


@dataclass(frozen=True, slots=True)
class Target:
    """Where one output goes."""

    kind: Kind = Kind.NONE
    path: str = ""
    arguments: tuple[str, ...] = ()
    strict: bool = False  # binary-v2: ending without a word is a failure


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be opened for a process."""

    stdin: str
    stdout: Target
    stderr: Target
    terminal: bool

    @property
    def request(self) -> StdioRequest:
        """The streams that the process needs. An output that nobody wants is the guest's /dev/null."""
        return StdioRequest(
            stdin=bool(self.stdin),
            stdout=self.terminal or self.stdout.kind is not Kind.NONE,
            stderr=self.stderr.kind is not Kind.NONE,
            terminal=self.terminal,
        )


def parse_target(uri: str) -> Target:
    """Return where an output goes.

    Raises:
        InvalidArgument: a scheme that is not in the table, or no absolute path.
    """
    if not uri:
        return Target()
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES if name)
        raise InvalidArgument(
            f"stdio {uri!r}: scheme {scheme!r} is not supported: expected a path or one of {known}"
        )
    if not scheme:
        path, query = uri, ""
    else:
        try:
            parts = urlsplit(uri)
        except ValueError as exc:  # brackets, where a host would stand
            raise InvalidArgument(f"stdio {uri!r} cannot be read: {exc}") from None
        path, query = unquote(parts.path), parts.query
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(f"stdio {uri!r}: {path!r} is no absolute path")
    if SCHEMES[scheme] is not Kind.BINARY:
        return Target(SCHEMES[scheme], path)
    return Target(Kind.BINARY, path, _arguments(query), strict=scheme == "binary-v2")


def _arguments(query: str) -> tuple[str, ...]:
    """Each key with its first value as two arguments; a value that is empty is left out."""
    values: dict[str, str] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        values.setdefault(key, value)
    return tuple(word for key, value in values.items() for word in ((key, value) if value else (key,)))


def plan(stdio: Stdio) -> Plan:
    """Return what to open for a process.

    Raises:
        InvalidArgument: one of the strings makes no sense.
    """
    stdout = parse_target(stdio.stdout)
    if stdio.terminal:
        stderr = Target()
    elif stdout.kind in (Kind.FILE, Kind.BINARY):
        stderr = stdout
    else:
        stderr = parse_target(stdio.stderr)
    stdin = parse_target(stdio.stdin)
    if stdin.kind not in (Kind.NONE, Kind.PATH, Kind.FIFO):
        raise InvalidArgument(f"stdin {stdio.stdin!r} is no path of a fifo")
    return Plan(stdin.path, stdout, stderr, stdio.terminal)
