"""Was it the host's OOM killer? SIGKILL tells nobody's name, the kernel's counters and its log do.

The kernel counts a victim before it kills it, and prints its process id after (Linux, mm/oom_kill.c,
__oom_kill_process). So a count that has not changed proves that it was somebody else; the line in the log
proves that it was this very process, wherever its control group was.
"""

from __future__ import annotations

import os
import re

import trio

VMSTAT = "/proc/vmstat"
KERNEL_LOG = "/dev/kmsg"
RECORD_SIZE = 8192  # bytes that one record has at most: Linux, printk internals, CONSOLE_EXT_LOG_MAX
LOG_WAIT = 0.5  # seconds until the kernel has printed what it has done
POLL = 0.02  # seconds; a read end of the log is always "readable" once there was anything


class Watch:
    """Knows what the OOM killer had done when it was made. `close` it."""

    def __init__(self) -> None:
        self._before = victims()
        self._log = -1
        try:
            self._log = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._log, 0, os.SEEK_END)  # only what comes from now on
        except OSError:
            self.close()  # not allowed, or there is none: then the count must do

    def close(self) -> None:
        """Give the descriptor back. Safe to call twice."""
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    async def explain(self, pid: int) -> tuple[bool, str]:
        """Tell whether the OOM killer surely was it that sent a process SIGKILL, and in words; "" if not."""
        count = victims() - self._before
        if not count:
            return False, ""
        with trio.move_on_after(LOG_WAIT):
            while self._log >= 0:
                if line := self._line_about(pid):
                    return True, (
                        "it was the host's OOM killer, because the host or a control group ran out of memory"
                        f" ({line})"
                    )
                await trio.sleep(POLL)
        if self._log >= 0:
            return False, ""  # it killed others
        return False, f"perhaps by the host's OOM killer, which has killed {count} since this one was started"

    def _line_about(self, pid: int) -> str:
        """Read the log on to the line about `pid`, or to its end."""
        while True:
            try:
                record = os.read(self._log, RECORD_SIZE)
            except BlockingIOError:
                return ""
            except BrokenPipeError:
                continue  # records were overwritten before they were read
            except OSError:
                self.close()
                return ""
            if line := find_victim(record, pid):
                return line


def find_victim(record: bytes, pid: int) -> str:
    """Return what a record of the kernel's log says of the killing of `pid`, or "". Pure.

    "6,339,5140900,-;Out of memory: Killed process 26916 (dd) total-vm:133340kB" (Linux, ABI: dev-kmsg).
    """
    text = record.partition(b";")[2].partition(b"\n")[0].decode(errors="replace")
    match = re.search(rf"^.*\bKilled process {pid} \([^)]*\)", text)
    return match[0] if match else ""


def victims() -> int:
    """Return how many processes the OOM killer has killed since the host booted; 0 if it does not tell."""
    try:
        with open(VMSTAT, "rb") as file:
            match = re.search(rb"^oom_kill (\d+)$", file.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0
