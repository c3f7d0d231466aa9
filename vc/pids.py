"""Processes of others by their ids, so that a later one of the same id is never hit.

An id is only a number, and the kernel gives it away again. The rule: a process is held by a pidfd first and
asked who it is afterwards, for what the id means then is what the pidfd means.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # proc(5): field 22; the name may hold blanks and brackets
    return int(stat.rpartition(")")[2].split()[19])


def argv_of(pid: int) -> list[bytes]:
    """Return the command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def kill(pid: int, is_meant: Callable[[], bool], *, wait: float = 0.0) -> bool:
    """Send SIGKILL to a process if `is_meant` says that its id means the right one.

    Waits at most `wait` seconds for its end; False if it has not ended by then. Blocks.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        if not is_meant():
            return True
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(wait * 1000))
    except ProcessLookupError:
        return True
    finally:
        os.close(handle)
