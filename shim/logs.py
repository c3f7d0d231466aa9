"""Log records as containerd's log wants them: one logrus text line each, never blocking, never fatal.

    time="2006-01-02T15:04:05.000000000Z" level=info msg="text" key=value key2="quoted value"

The reader is containerd. While it is stopped nobody reads, and a slow one leaves the pipe full. No pod may
wait for its log, so a line that does not go out at once is dropped, but for the last warnings and errors,
which may tell why a pod has ended: they are kept until somebody reads again.

containerd reads one fifo for each task. With the task for which the shim was started it leaves that fifo,
though other tasks may live on in the shim; then the log goes on in theirs.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext

MAX_LINE = 4096  # bytes: linux/limits.h PIPE_BUF, up to which a line reaches the pipe whole or not at all
KEPT_LINES = 64  # a quarter of a MiB at most
LEVELS = {"WARNING": "warning", "ERROR": "error", "CRITICAL": "fatal", "INFO": "info", "DEBUG": "debug"}
# logrus, TextFormatter.needsQuoting
BARE = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._/@^+"
)  # logrus needsQuoting


def format_line(level: str, message: str, fields: Mapping[str, object], *, at: float) -> bytes:
    """Return one line; `at` is in seconds since the epoch."""
    seconds, fraction = divmod(round(at * 1e9), 10**9)
    moment = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{fraction:09d}Z"
    words = [f'time="{moment}"', f"level={level}", f"msg={_quote(message)}"]
    words += [f"{key}={_value(str(value))}" for key, value in fields.items()]
    line = " ".join(words).encode(errors="backslashreplace")
    if len(line) >= MAX_LINE:
        line = _cut(line, MAX_LINE - 5)  # room for three dots, a quote and the newline
    return line + b"\n"


def _cut(line: bytes, size: int) -> bytes:
    """Return the first bytes of a line with a mark that there were more; a quote that is open is closed."""
    line = line[:size].decode(errors="ignore").encode()
    quoted = escaped = False
    for char in line.decode():
        if escaped or char == "\\":
            escaped = not escaped
        elif char == '"':
            quoted = not quoted
    if escaped:
        line = line[:-1]
    return line + (b'..."' if quoted else b"...")


def _value(text: str) -> str:
    return text if text and BARE.issuperset(text) else _quote(text)


def _quote(text: str) -> str:
    """Quote as Go's strconv.Quote does, for what matters to a reader of lines."""
    named = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(named.get(c) or (c if c.isprintable() else _escape(ord(c))) for c in text) + '"'


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


class FifoHandler(logging.Handler):
    """Write log records to a non-blocking descriptor, which the caller keeps open."""

    def __init__(self, descriptor: int, fields: Mapping[str, object]) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._fields = fields
        self.fifos: Callable[[], Iterable[str]] = tuple  # where a reader may be if this one has left
        self._kept: deque[bytes] = deque(maxlen=KEPT_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, or keep or drop it."""
        try:
            message = record.getMessage()
            if record.exc_info:
                formatted = logging.Formatter().formatException(record.exc_info)
                message = f"{message}\n{formatted[-3000:]}"  # the end of a traceback says most
            level = LEVELS.get(record.levelname, "info")
            line = format_line(level, message, self._fields, at=record.created)
        except Exception:  # a mistake in what is logged must not be one in what is done: see logging.Handler
            self.handleError(record)
            return
        if not (self._write_kept() and self._write(line)) and record.levelno >= logging.WARNING:
            self._kept.append(line)

    def flush(self) -> None:
        """Write what was kept, if somebody reads again."""
        with self.lock or nullcontext():
            self._write_kept()

    def _write_kept(self) -> bool:
        while self._kept and self._write(self._kept[0]):
            self._kept.popleft()
        return not self._kept

    def _write(self, line: bytes) -> bool:
        try:
            try:
                os.write(self._descriptor, line)
            except BrokenPipeError:
                if not any(self._move(path) for path in self.fifos()):
                    raise
                os.write(self._descriptor, line)
        except OSError:
            return False  # nobody reads (EPIPE), or not fast enough (EAGAIN)
        return True

    def _move(self, path: str) -> bool:
        """Write to another fifo from now on, if somebody reads it."""
        try:
            found = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if not stat.S_ISFIFO(os.fstat(found).st_mode):
                return False
            os.dup2(found, self._descriptor)
            return True
        finally:
            os.close(found)


def install(descriptor: int, fields: Mapping[str, object], *, debug: bool) -> None:
    """Send this process's log, its warnings included, to `descriptor`."""
    logging.captureWarnings(True)  # noqa: FBT003
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.handlers[:] = [FifoHandler(descriptor, fields)]
    root.setLevel(logging.DEBUG if debug else logging.INFO)


def follow(fifos: Callable[[], Iterable[str]]) -> None:
    """Have the log go on in one of these when nobody reads its fifo any more."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, FifoHandler):
            handler.fifos = fifos


def flush() -> None:
    """Write what nobody read, now that there may be a reader."""
    for handler in logging.getLogger().handlers:
        handler.flush()
