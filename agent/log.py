"""The agent's log: one logfmt line per event, on the console as process 1 and on standard error otherwise.

A hand-made writer, because `logging` costs more at start-up than the rest of the agent. Lines are written
with one `write` each, so threads do not mix them.
"""

from __future__ import annotations

import os
import sys
import time

DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40

# Kata's names for `agent.log`: slog's levels.
_LEVELS = {
    "trace": DEBUG,
    "debug": DEBUG,
    "info": INFO,
    "warn": WARNING,
    "warning": WARNING,
    "error": ERROR,
    "critical": ERROR,
}
_NAMES = {DEBUG: "debug", INFO: "info", WARNING: "warning", ERROR: "error"}

_fd = 2
_level = INFO


def set_output(fd: int) -> None:
    """Write to this descriptor from now on."""
    global _fd
    _fd = fd


def set_level(name: str) -> None:
    """Take a level by Kata's name for it; an unknown name changes nothing."""
    global _level
    _level = _LEVELS.get(name.lower(), _level)


def format_value(value: object) -> str:
    """Return a value as logfmt has it: quoted if it holds anything but plain characters."""
    text = str(value)
    if text and text.isprintable() and not any(c in ' "=' for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return '"' + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in escaped) + '"'


def _write(level: int, message: str, fields: dict[str, object]) -> None:
    if level < _level:
        return
    parts = [f"ts={time.time():.6f} level={_NAMES[level]} name=agent msg={format_value(message)}"]
    parts += [f"{key}={format_value(value)}" for key, value in fields.items()]
    try:
        os.write(_fd, (" ".join(parts) + "\n").encode("utf-8", "replace"))
    except OSError:
        pass  # a log that cannot be written must not stop the work


def debug(message: str, **fields: object) -> None:
    """Log what only a developer wants to see."""
    _write(DEBUG, message, fields)


def info(message: str, **fields: object) -> None:
    """Log what happened."""
    _write(INFO, message, fields)


def warning(message: str, **fields: object) -> None:
    """Log what went wrong and was worked around."""
    _write(WARNING, message, fields)


def error(message: str, **fields: object) -> None:
    """Log what went wrong."""
    _write(ERROR, message, fields)


def exception(message: str, exc: BaseException, **fields: object) -> None:
    """Log an exception that is a bug, with the places it came through."""
    places = []
    traceback = exc.__traceback__
    while traceback is not None:  # by hand: `traceback` imports a lot to print a few lines
        code = traceback.tb_frame.f_code
        places.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{traceback.tb_lineno}:{code.co_name}")
        traceback = traceback.tb_next
    _write(
        ERROR, message, {**fields, "error": f"{type(exc).__name__}: {exc}", "traceback": " > ".join(places)}
    )


def unraisable(args: object) -> None:
    """Log what Python could raise to nobody (`sys.unraisablehook`)."""
    exc = getattr(args, "exc_value", None)
    if isinstance(exc, BaseException):
        exception("unraisable exception", exc)


def install_hooks() -> None:
    """Send what would go to standard error as a traceback to the log instead."""
    sys.unraisablehook = unraisable
    sys.excepthook = lambda _type, exc, _traceback: exception("uncaught exception", exc)
