"""What is in a pod's network namespace, without entering it.

A process that runs in the namespace shows its interfaces in /proc/PID/net/dev, so neither netlink nor a
change of namespace is needed to look.
"""

from __future__ import annotations

from pathlib import Path

LOOPBACK = "lo"


def parse_interfaces(text: str) -> list[str]:
    """Take the interface names out of /proc/net/dev (proc(5)); the loopback is left out."""
    names = [line.split(":", 1)[0].strip() for line in text.splitlines()[2:] if ":" in line]
    return [name for name in names if name != LOOPBACK]


def interfaces_of(pid: int) -> list[str]:
    """Name the interfaces that process `pid` sees; empty if it is gone."""
    try:
        return parse_interfaces(Path(f"/proc/{pid}/net/dev").read_text())
    except OSError:
        return []
