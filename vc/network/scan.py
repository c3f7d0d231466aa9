"""What is in a pod's network namespace, without entering it.

A process that runs in the namespace shows its interfaces in /proc/PID/net/dev, so neither netlink nor a
change of namespace is needed to look. Only if there is none, a program enters the namespace and reads it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

LOOPBACK = "lo"
ENTER_TIMEOUT = 5.0  # seconds; it takes some milliseconds, and what it tells is only for the log


def parse_interfaces(text: str) -> list[str]:
    """Take the interface names out of /proc/net/dev (proc(5)); the loopback is left out."""
    names = [line.split(":", 1)[0].strip() for line in text.splitlines()[2:] if ":" in line]
    return [name for name in names if name != LOOPBACK]


def interfaces_of(pid: int, netns: str = "") -> list[str]:
    """Name the interfaces of a namespace: that of process `pid`, which mostly is also that of `netns`.

    Empty if it is gone. Blocks for some milliseconds if the process is in another one than `netns`.
    """
    try:
        if not netns or Path(f"/proc/{pid}/ns/net").samefile(netns):
            return parse_interfaces(Path(f"/proc/{pid}/net/dev").read_text())
        argv = ["nsenter", f"--net={netns}", "--", "cat", "/proc/self/net/dev"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=ENTER_TIMEOUT)
        return parse_interfaces(done.stdout)
    except (OSError, subprocess.SubprocessError):
        return []
