"""The cgroup of a container: its statistics, its out-of-memory events, killing all of it. Versions 1 and 2.

A guest has version 2. On a host (the driver without a VM, tests) it is whatever the host has, so paths are
taken from the process itself and nothing is assumed about them. Parsing is apart from reading.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.schema import agent as messages

ROOT = "/sys/fs/cgroup"
HYBRID = f"{ROOT}/unified"  # where systemd puts version 2 beside version 1
UNLIMITED = (1 << 64) - 1  # what "max" becomes in an unsigned field
SIGKILL = 9


class Cgroup:
    """The directories of one container, by controller; a version 2 hierarchy is the one named ""."""

    def __init__(self, paths: dict[str, str]) -> None:
        self.paths = paths

    @property
    def unified(self) -> bool:
        """Whether this is version 2."""
        return "" in self.paths

    def file(self, controller: str, name: str) -> str | None:
        """Return the path of a control file, if its controller is there."""
        directory = self.paths.get("") or self.paths.get(controller)
        return f"{directory}/{name}" if directory else None

    def read(self, controller: str, name: str) -> str:
        """Return the text of a control file; nothing if it is not there."""
        path = self.file(controller, name)
        if path is None:
            return ""
        try:
            with open(path, encoding="utf-8") as file:
                return file.read()
        except OSError:
            return ""

    def kill(self) -> None:
        """Kill every process in it, below it, and frozen. Does not wait for them."""
        if self.unified:
            try:
                with open(f"{self.paths['']}/cgroup.kill", "w", encoding="utf-8") as file:
                    file.write("1")
                return
            except OSError:
                pass  # a kernel before 5.14, or a cgroup that has gone
        directory = self.paths.get("") or self.paths.get("freezer") or next(iter(self.paths.values()), None)
        if directory is None:
            return
        freezer = self.file("freezer", "freezer.state")
        _write(freezer, "FROZEN")  # so that nothing is forked while we look
        for pid in _pids(directory):
            try:
                os.kill(pid, SIGKILL)
            except ProcessLookupError:
                pass
        _write(freezer, "THAWED")

    def oom_kills(self) -> int:
        """Return how many processes the kernel has killed for want of memory."""
        name = "memory.events" if self.unified else "memory.oom_control"
        return pairs(self.read("memory", name)).get("oom_kill", 0)

    def stats(self) -> messages.CgroupStats:
        """Return everything that is counted."""
        from agent import stats

        return (stats.version2 if self.unified else stats.version1)(self.read)


def of_process(pid: int) -> Cgroup:
    """Return the cgroup that a process is in."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            memberships = file.read()
    except OSError:
        return Cgroup({})
    return Cgroup(locate(memberships, v2_root=is_unified()))


def is_unified() -> bool:
    """Whether version 2 is all there is."""
    return os.path.exists(f"{ROOT}/cgroup.controllers")


def is_hybrid() -> bool:
    """Whether both versions are mounted below one directory, with which crun refuses to work."""
    return os.path.ismount(HYBRID) and not is_unified()


def locate(memberships: str, *, v2_root: bool) -> dict[str, str]:
    """Return the directories that the lines of /proc/PID/cgroup mean: "id:controllers:path" each."""
    paths: dict[str, str] = {}
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        if path == "/":
            continue  # the root is nobody's container
        if v2_root:
            if not controllers:
                paths[""] = ROOT + path
            continue
        for controller in controllers.split(","):
            if controller and not controller.startswith("name="):
                paths[controller] = f"{ROOT}/{controller}{path}"
    return paths


def pairs(text: str) -> dict[str, int]:
    """Parse lines of a name and a number."""
    result = {}
    for line in text.splitlines():
        name, _, number = line.partition(" ")
        if number.strip().isdigit():
            result[name] = int(number)
    return result


def _pids(directory: str) -> list[int]:
    found: list[int] = []
    for path, _, _ in os.walk(directory):
        try:
            with open(f"{path}/cgroup.procs", encoding="utf-8") as file:
                found += map(int, file.read().split())
        except OSError:
            continue
    return [pid for pid in found if pid > 0]


def _write(path: str | None, text: str) -> None:
    if path is None:
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        pass
