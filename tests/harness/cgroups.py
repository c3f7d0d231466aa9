"""Control groups of the host with a limit, for whatever a test wants to run out of something."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
# Controller: the file of the limit in version 1, and in version 2.
LIMITS = {"memory": ("memory.limit_in_bytes", "memory.max"), "pids": ("pids.max", "pids.max")}


def missing(controller: str) -> str:
    """Say why there can be no group with this controller; "" if there can."""
    if not (_parent(controller) / "cgroup.procs").exists():
        return f"the host has no cgroup controller {controller!r}"
    return ""


@contextmanager
def limited(controller: str, limit: int) -> Iterator[Path]:
    """Have a group with a limit, in bytes or processes. Who joins it has ended before the block has."""
    group = _parent(controller) / f"kata-test-{secrets.token_hex(4)}"
    group.mkdir()
    try:
        _limit_file(group, controller).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def change(group: Path, controller: str, limit: int) -> None:
    """Give a group another limit."""
    _limit_file(group, controller).write_text(str(limit))


def _limit_file(group: Path, controller: str) -> Path:
    return next(path for name in LIMITS[controller] if (path := group / name).exists())


def _parent(controller: str) -> Path:
    unified = ROOT / "cgroup.controllers"
    return ROOT if unified.exists() else ROOT / controller
