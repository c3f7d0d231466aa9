"""What lies about on the host and belongs to no live sandbox: found first, removed only on demand.

A thing has an owner as long as a process holds the lock of its sandbox or of its VM. Finding changes nothing
and disturbs nobody: what was made within the last seconds counts as owned, because its maker may not hold the
lock yet. Removing asks again, thing by thing, because an owner may have come meanwhile.

Only what is known to be ours is ever named: processes by the id of a VM of this run directory, mounts and
files by lying in it, and a shim's socket because its name is the hash of what a dead sandbox is called. A
kind of thing that sandboxes begin to hold on the host gets a finder in `FINDERS` and a remover in `REMOVERS`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from vc.cleanup import KILL_WAIT, belongs_to, remove_directory
from vc.errors import NotFound, VCError, WrongState
from vc.factory.handover import handover_path
from vc.factory.templates import TEMPORARY, Templates
from vc.network.taps import marked_taps, remove_tap
from vc.persist import store
from vc.persist.schema import BrokenRecord
from vc.persist.store import LOCK, Layout
from vc.pids import argv_of, kill, start_ticks
from vc.storage.mounts import mounted_below, unmount
from vc.unixsock import connect_nowait

TEMPLATES = "template"  # no VM, but saved ones: the default of [factory] template_path
YOUNG = 2.0  # seconds, in which whoever made a directory has also locked it
SHIM_SOCKETS = Path("/run/containerd/s")  # containerd: defaults.DefaultStateDir and the shim library's "s"
CONTAINERD = "/run/containerd/containerd.sock"  # containerd: defaults.DefaultAddress
ID_SEPARATOR = "--"  # between containerd's namespace and the id; in neither can it occur


class Kind(Enum):
    """What it is; in the order in which they are removed, for each may hold the next."""

    PROCESS = "process"
    MOUNT = "mount"
    TAP = "tap"
    SOCKET = "socket"
    FILE = "file"
    DIRECTORY = "directory"
    TEMPLATE = "template"


@dataclass(frozen=True, slots=True)
class Leak:
    """One thing without an owner."""

    kind: Kind
    name: str  # the path, or a process's id
    what: str  # for a human
    started: int = 0  # of a process: clock ticks since boot, which tell it from a later one of the same id
    vmid: str = ""  # of a process

    def __str__(self) -> str:
        return f"{self.kind.value} {self.name}: {self.what}"


@dataclass(frozen=True, slots=True)
class Owners:
    """Which sandboxes and VMs of a run directory live, and which do not."""

    layout: Layout
    containerd: str  # its address, which is in the names of shims' sockets
    shim_sockets: Path
    live_sandboxes: frozenset[str]
    dead_sandboxes: Mapping[str, str]  # and the VM of each, "" if the record does not tell
    live_vms: frozenset[str]
    dead_vms: frozenset[str]
    templates: Path | None = None  # where they are kept
    cache_socket: Path | None = None

    def owns(self, path: Path) -> bool:
        """Tell whether a path below the run directory belongs to a live sandbox or VM."""
        for parent, live in (
            (self.layout.sandboxes, self.live_sandboxes),
            (self.layout.vms, self.live_vms),
        ):
            if path.is_relative_to(parent) and path != parent:
                return path.relative_to(parent).parts[0] in live
        return False


def find(
    run_dir: Path,
    *,
    containerd: str = CONTAINERD,
    shim_sockets: Path = SHIM_SOCKETS,
    templates: Path | None = None,
    cache_socket: Path | None = None,
) -> list[Leak]:
    """List what is left in `run_dir`, and elsewhere because of it. Changes nothing."""
    owners = look(run_dir, containerd=containerd, shim_sockets=shim_sockets)
    dead_vms = owners.dead_vms | {path.name for waste in _waste(templates) for path in waste.glob("run/vm/*")}
    owners = replace(owners, dead_vms=dead_vms, templates=templates, cache_socket=cache_socket)
    found = [leak for finder in FINDERS for leak in finder(owners)]
    # A VM that changed its owner, or began, while we looked: its process was judged by what was true before.
    now = look(run_dir, containerd=containerd, shim_sockets=shim_sockets)
    return [leak for leak in found if leak.kind is not Kind.PROCESS or leak.vmid not in now.live_vms]


def look(run_dir: Path, *, containerd: str, shim_sockets: Path) -> Owners:
    """Find out what lives."""
    layout = Layout(run_dir)
    sandboxes = list(store.sandbox_ids(layout))
    live = frozenset(name for name in sandboxes if is_owned(layout.sandbox(name)))
    vm_of = {name: _vm_of(layout, name) for name in sandboxes}
    vms = {entry.name for entry in _entries(layout.vms) if entry.is_dir()}
    live_vms = {vm_of[name] for name in live} | {name for name in vms if is_owned(layout.vm(name))}
    live_vms = {name for vmid in live_vms for name in layout.names_of(vmid)}
    live_vms.add(TEMPLATES)
    dead_vms = {name for vmid in vms | set(vm_of.values()) for name in layout.names_of(vmid)}
    return Owners(
        layout,
        containerd,
        shim_sockets,
        live_sandboxes=live,
        dead_sandboxes={name: vm_of[name] for name in sandboxes if name not in live},
        live_vms=frozenset(live_vms),
        dead_vms=frozenset(dead_vms - live_vms - {""}),
    )


def is_owned(directory: Path) -> bool:
    """Tell whether a process holds the lock of a directory, or may be about to take it."""
    try:
        if _is_young(directory):
            return True
        with (directory / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # it is gone, or has no lock and thus no owner
    return False


def _is_young(directory: Path) -> bool:
    # Also after the clock was set back, so not by the sign alone.
    return 0 <= time.time() - directory.stat().st_mtime < YOUNG


def _vm_of(layout: Layout, sandbox_id: str) -> str:
    try:
        return store.load(layout, sandbox_id).vmid
    except (NotFound, BrokenRecord):
        return ""


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def _processes(owners: Owners) -> Iterator[Leak]:
    """Find processes of VMs that are known to be dead, or whose files would lie in the run directory."""
    for entry in _entries(Path("/proc")):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        # First of all: should the id be given to another process now, it is not that one which is named.
        started = start_ticks(int(entry.name))
        argv = argv_of(int(entry.name))
        vmid = next((vmid for vmid in owners.dead_vms if belongs_to(argv, vmid)), None)
        vmid = vmid or _unknown_vm(argv, owners)
        if vmid:
            program = Path(os.fsdecode(argv[0])).name
            yield Leak(Kind.PROCESS, entry.name, f"{program} of VM {vmid}", started, vmid)


def _unknown_vm(argv: list[bytes], owners: Owners) -> str | None:
    """Return the VM that a command line names by a path in the run directory, unless it lives."""
    prefix = os.fsencode(owners.layout.vms) + b"/"
    for word in argv:
        _, found, rest = word.partition(prefix)
        vmid = os.fsdecode(rest.partition(b"/")[0])
        if found and vmid and vmid not in owners.live_vms and belongs_to(argv, vmid):
            return vmid
    return None


def _mounts(owners: Owners) -> Iterator[Leak]:
    """Find mounts in this process's mount namespace: a sandbox makes its own in one that dies with it."""
    layout = owners.layout
    for point in mounted_below(layout.run_dir):
        # An administrator may have mounted something to hold the directories themselves.
        if point not in (layout.run_dir, layout.sandboxes, layout.vms) and not owners.owns(point):
            yield Leak(Kind.MOUNT, str(point), "mounted in a directory of a sandbox that is gone")


def _shim_sockets(owners: Owners) -> Iterator[Leak]:
    for sandbox_id in owners.dead_sandboxes:
        namespace, separator, name = sandbox_id.partition(ID_SEPARATOR)
        path = owners.shim_sockets / socket_name(owners.containerd, namespace, name)
        if separator and refuses(path):
            yield Leak(Kind.SOCKET, str(path), f"nobody listens; the shim's of sandbox {sandbox_id!r}")


def socket_name(containerd: str, namespace: str, name: str) -> str:
    """Return how a shim's socket is called, by the convention of containerd's shim library."""
    return hashlib.sha256(os.path.normpath(f"{containerd}/{namespace}/{name}").encode()).hexdigest()


def refuses(path: Path) -> bool:
    """Tell whether `path` is a socket on which nobody listens."""
    try:
        if path.is_symlink() or not path.is_socket():
            return False
        connect_nowait(path).close()
    except OSError as exc:
        return exc.errno == errno.ECONNREFUSED
    return False


def _files(owners: Owners) -> Iterator[Leak]:
    layout = owners.layout
    for entry in (*_entries(layout.sandboxes), *_entries(layout.vms)):
        if owners.owns(entry):
            continue
        if entry.is_dir() and not entry.is_symlink():
            whose = "sandbox" if entry.parent == layout.sandboxes else "VM"
            yield Leak(Kind.DIRECTORY, str(entry), f"of a {whose} that nobody owns")
        elif refuses(entry):
            yield Leak(Kind.SOCKET, str(entry), "nobody listens")
        elif not entry.is_socket():
            yield Leak(Kind.FILE, str(entry), "of no sandbox and no VM")


def _caches(owners: Owners) -> Iterator[Leak]:
    """Find the doors of a VM cache that is gone. Its VMs are found by their directories."""
    if owners.cache_socket is not None:
        for path in (owners.cache_socket, handover_path(owners.cache_socket)):
            if refuses(path):
                yield Leak(Kind.SOCKET, str(path), "nobody listens; of a VM cache that is gone")


def _templates(owners: Owners) -> Iterator[Leak]:
    """Find what a maker of a template left that was killed."""
    for entry in _waste(owners.templates):
        yield Leak(Kind.TEMPLATE, str(entry), "half a template, whose maker is gone")


def _waste(templates: Path | None) -> list[Path]:
    """Return what makers of templates left, if none of them lives."""
    if templates is None or is_owned(templates):
        return []
    entries = [entry for entry in _entries(templates) if entry.name.startswith(TEMPORARY) and entry.is_dir()]
    return [entry for entry in entries if not _is_young(entry)]


def _taps(owners: Owners) -> Iterator[Leak]:
    for name, mark in marked_taps(owners.layout.vms):
        if mark.name not in owners.live_vms:
            yield Leak(Kind.TAP, name, f"of VM {mark.name}, which is gone")


FINDERS: tuple[Callable[[Owners], Iterator[Leak]], ...] = (
    _processes,
    _mounts,
    _taps,
    _shim_sockets,
    _caches,
    _files,
    _templates,
)


def remove(leaks: Iterable[Leak]) -> Iterator[tuple[Leak, str]]:
    """Remove what was found, one after the other; yield each with the reason why it is still there, or ""."""
    order = list(Kind)
    for leak in sorted(leaks, key=lambda leak: order.index(leak.kind)):
        try:
            REMOVERS[leak.kind](leak)
        except FileNotFoundError:
            yield leak, ""  # it went by itself
        except (OSError, VCError) as exc:
            yield leak, str(exc)
        else:
            yield leak, ""


def _kill(leak: Leak) -> None:
    pid = int(leak.name)
    if not kill(pid, lambda: start_ticks(pid) == leak.started, wait=KILL_WAIT):
        raise WrongState(f"it does not die of SIGKILL within {KILL_WAIT} s")


def _unmount(leak: Leak) -> None:
    path = Path(leak.name)
    if not unmount(path) and path in mounted_below(path):
        raise WrongState("it cannot be detached: is this run as root, and in the host's mount namespace?")


def _unlink_socket(leak: Leak) -> None:
    path = Path(leak.name)
    if path.exists() and not refuses(path):
        raise WrongState("somebody listens there now")
    path.unlink()


def _unlink(leak: Leak) -> None:
    Path(leak.name).unlink()


def _remove_directory(leak: Leak) -> None:
    directory = Path(leak.name)
    if _is_young(directory):
        raise WrongState("somebody made it or something in it just now")
    lock = store.SandboxLock(directory)
    try:
        if not lock.acquire_nowait():
            raise WrongState("it has an owner now")
        remove_directory(directory)
    finally:
        lock.release()
    if directory.exists():
        raise WrongState("something in it cannot be removed")


def _remove_waste(leak: Leak) -> None:
    waste = Path(leak.name)
    # To take the lock removes what is left of makers that had it.
    with Templates(waste.parent).locked(wait=False) as ours:
        if not ours:
            raise WrongState("a template is being made there now")
    if waste.exists():
        raise WrongState("something in it cannot be removed")


REMOVERS: Mapping[Kind, Callable[[Leak], None]] = {
    Kind.PROCESS: _kill,
    Kind.MOUNT: _unmount,
    Kind.TAP: lambda leak: remove_tap(leak.name),
    Kind.SOCKET: _unlink_socket,
    Kind.FILE: _unlink,
    Kind.DIRECTORY: _remove_directory,
    Kind.TEMPLATE: _remove_waste,
}
