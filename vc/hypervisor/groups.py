"""Control groups of a VMM that changed its owner: it goes to those of the new one.

A service manager that ends the cache's server may kill all that is in the server's group (systemd,
KillMode=control-group), and whatever limits the pod's shim has are meant for its VMM, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


def parse_groups(text: str) -> dict[str, str]:
    """Return the group in each hierarchy, by its controllers; cgroups(7), /proc/PID/cgroup."""
    fields = [line.split(":", 2) for line in text.splitlines()]
    return {controllers: path for _, controllers, path in fields}


def parse_mounts(text: str) -> Iterator[tuple[set[str], str, str]]:
    """Yield options, root and place of each mounted hierarchy; proc(5), /proc/PID/mountinfo."""
    for line in text.splitlines():
        fields = line.split()
        kind, _, options = fields[fields.index("-") + 1 :]
        if kind in ("cgroup", "cgroup2"):
            # Version 2 has one hierarchy, whose controllers /proc/PID/cgroup does not name.
            yield set(options.split(",")) if kind == "cgroup" else {""}, fields[3], fields[4]


def directory_of(controllers: str, group: str, mounts: Iterator[tuple[set[str], str, str]]) -> Path | None:
    """Return the directory of a group; None if it is not mounted here. Pure."""
    for options, root, place in mounts:
        if set(controllers.split(",")) <= options and f"{group}/".startswith(f"{root.rstrip('/')}/"):
            return Path(place, group[len(root.rstrip("/")) :].lstrip("/"))
    return None


def bring_here(*pids: int) -> None:
    """Move processes into our own control groups, where they are in others; what fails is only logged."""
    try:
        ours = parse_groups(Path("/proc/self/cgroup").read_text())
        mounts = Path("/proc/self/mountinfo").read_text()
        for pid in filter(None, pids):  # 0 is one that is gone, and would mean ourselves
            theirs = parse_groups(Path(f"/proc/{pid}/cgroup").read_text())
            for controllers in (name for name, group in ours.items() if theirs.get(name) != group):
                directory = directory_of(controllers, ours[controllers], parse_mounts(mounts))
                if directory is not None:
                    (directory / "cgroup.procs").write_text(str(pid))
    except OSError as exc:
        log.debug("the control groups of processes %s were not changed: %s", pids, exc)
