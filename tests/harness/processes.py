"""Processes that belong to one harness, found in /proc, and ended by identity and never by name."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "KATA_HARNESS"  # environment variable that every process under a harness inherits


@dataclass(frozen=True, slots=True)
class Process:
    """One process; `started` (clock ticks since boot) tells it from a later one with the same pid."""

    pid: int
    started: int
    argv: str

    def __str__(self) -> str:
        return f"{self.pid} {self.argv[:160]}"


def read_process(pid: int) -> Process | None:
    """Return what /proc says about `pid`, or None if it is gone."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes()
        # Field 2 is the name in parentheses, which may hold anything; `started` is field 22 (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] == "Z":
        return None
    return Process(pid, int(fields[19]), argv.replace(b"\0", b" ").decode(errors="replace").strip())


def processes_of(directory: Path) -> Iterator[Process]:
    """Yield the processes whose environment, arguments or working directory name `directory`."""
    mark = f"{MARK}={directory}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        process = read_process(int(entry.name))
        if process is not None and _belongs(process, mark, str(directory)):
            yield process


def _belongs(process: Process, mark: bytes, directory: str) -> bool:
    with suppress(OSError):
        if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
            return True
    with suppress(OSError):
        if Path(f"/proc/{process.pid}/cwd").readlink().is_relative_to(directory):
            return True
    return directory + "/" in process.argv


def kill(process: Process) -> None:
    """Kill exactly this process: the descriptor pins the pid before the identity is checked."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if (now := read_process(process.pid)) is not None and now.started == process.started:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
