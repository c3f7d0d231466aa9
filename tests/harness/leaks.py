"""What a container may leave behind on the host: listed before and after, the difference is a leak.

Each thing is one line of text, so that a difference reads as a list of what is left.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from tests.harness.containerd import Containerd, cgroups_of
from tests.harness.processes import processes_of
from vc import leaks

SETTLE = 15.0  # seconds in which a finished container's shim must have ended
INTERVAL = 0.05
SHIM_SOCKETS = Path("/run/containerd/s")  # where a shim binds (containerd: defaults.DefaultStateDir)
BUNDLES = ("io.containerd.runtime.v2.task", "io.containerd.sandbox.controller.v1.shim")
SHARED_DIRECTORIES = [
    Path("/run/netns"),
    Path("/run/vc/sbs"),
    Path("/run/vc/vm"),
    Path("/run/kata-containers"),
]


def shim_socket(containerd: Containerd, container: str) -> Path:
    """Return where the shim of `container` listens (the convention of containerd's shim library)."""
    name = f"{containerd.address}/{containerd.namespace}/{container}"
    return SHIM_SOCKETS / hashlib.sha256(name.encode()).hexdigest()


def snapshot(containerd: Containerd) -> frozenset[str]:
    """List everything on the host that belongs to `containerd`'s containers."""
    lines = [
        line
        for source in (_processes, _mounts, _sockets, _directories, _cgroups, _descriptors)
        for line in source(containerd)
    ]
    kept = containerd.kept_vms()  # asked last, so that it knows each VM that was seen
    return frozenset(line for line in lines if not any(vmid in line for vmid in kept))


def left_over(
    containerd: Containerd, before: frozenset[str], *, but: Callable[[str], bool] = lambda _: False
) -> list[str]:
    """Return what is there beyond `before`, except `but`, after giving it time to go away.

    A client's command ends before the shim has, and nothing tells when all of it is gone: look repeatedly.
    """
    deadline = time.monotonic() + SETTLE
    while True:
        left = sorted(line for line in snapshot(containerd) - before if not but(line))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(INTERVAL)


def forgotten(containerd: Containerd) -> list[str]:
    """Return what `kata-runtime leaks` would name, after giving it time to go away."""
    if containerd.runtime.run_dir is None:
        return []
    deadline = time.monotonic() + SETTLE
    while True:
        found = leaks.find(containerd.runtime.run_dir, containerd=containerd.address)
        if not found or time.monotonic() > deadline:
            return [str(leak) for leak in found]
        time.sleep(INTERVAL)


def _processes(containerd: Containerd) -> Iterator[str]:
    for process in processes_of(containerd.directory):
        if process.pid != containerd.daemon_pid:
            yield f"process {process}"
    children = Path(f"/proc/{containerd.daemon_pid}/task")
    for task in children.iterdir():
        with suppress(OSError):
            for pid in (task / "children").read_text().split():
                yield f"child of containerd {pid}"


def _mounts(containerd: Containerd) -> Iterator[str]:
    pids = ["self", str(containerd.daemon_pid), *(str(p.pid) for p in processes_of(containerd.directory))]
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
                if str(containerd.directory) in line:
                    fields = line.split()
                    yield f"mount {fields[4]} ({fields[fields.index('-') + 1]})"


def _sockets(containerd: Containerd) -> Iterator[str]:
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        # Field 3 holds the flags; __SO_ACCEPTCON (0x10000) marks a listener.
        if len(fields) == 8 and str(containerd.directory) in fields[7] and int(fields[3], 16) & 0x10000:
            yield f"listening socket {fields[7]}"
    for container in containerd.ids:
        if (path := shim_socket(containerd, container)).exists():
            yield f"socket {path} of {container}"


def _directories(containerd: Containerd) -> Iterator[str]:
    namespace = containerd.namespace
    mine = [
        *(
            containerd.directory / place / plugin / namespace
            for plugin in BUNDLES
            for place in ("state", "root")
        ),
        containerd.directory / "fifo",
        containerd.directory / "tmp",
    ]
    for directory in mine:
        for path in directory.glob("*"):
            yield f"file {path}"
    if containerd.runtime.run_dir is not None:
        for path in containerd.runtime.run_dir.glob("*/*"):
            yield f"file {path}"
    for directory in SHARED_DIRECTORIES:
        for path in directory.glob("*"):
            if directory.name == "netns" or namespace in path.name:
                yield f"file {path}"


def _cgroups(containerd: Containerd) -> Iterator[str]:
    for group in cgroups_of(containerd.namespace):
        if group.name != containerd.namespace:  # runc leaves the parent
            yield f"cgroup {group}"


def _descriptors(containerd: Containerd) -> Iterator[str]:
    """Number the daemon's descriptors of each kind: one more than before has a number that is new."""
    kinds: Counter[str] = Counter()
    for descriptor in Path(f"/proc/{containerd.daemon_pid}/fd").iterdir():
        with suppress(OSError):
            kinds[str(descriptor.readlink()).partition(":[")[0]] += 1
    for kind, count in kinds.items():
        yield from (f"descriptor of containerd: {kind}, number {number}" for number in range(count))
