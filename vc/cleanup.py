"""Removing what a sandbox left behind, from any process and with the record alone.

Every step takes "already gone" for success, none needs the guest, and all run even if one fails. Processes
are found by the VM's id in their command line, so that a process id that was reused is never hit.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from vc.errors import NotFound, VCError
from vc.persist import store
from vc.persist.schema import BrokenRecord, SandboxRecord
from vc.persist.store import Layout, SandboxLock
from vc.pids import argv_of, kill, start_ticks
from vc.storage.mounts import unmount_below
from vc.storage.share import Share
from vc.storage.share import remove as remove_share
from vc.storage.sharedfs import SHARED_LINK

OWNER_GRACE = 2.0  # seconds that an owner which is still ending gets before it is killed
KILL_WAIT = 2.0  # seconds until a killed process must be gone
POLL = 0.02  # seconds: neither flock nor the death of a foreign process group can be waited for with a limit


def belongs_to(argv: list[bytes], vmid: str) -> bool:
    """Tell whether a command line is that of a VM's process: the VMM by its name, virtiofsd by its path."""
    name = f"sandbox-{vmid},".encode()
    link = f"/{vmid}/{SHARED_LINK}".encode()
    return any(word.startswith(name) or link in word for word in argv)


def processes_of(vmid: str) -> list[int]:
    """Find the processes of a VM: the VMM and virtiofsd, also while they are being started."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if belongs_to(argv_of(pid), vmid)]


def kill_processes(vmid: str) -> int:
    """Kill the processes of a VM and wait until they are gone; return how many there were."""
    pids = processes_of(vmid)
    for pid in pids:
        kill(pid, lambda pid=pid: belongs_to(argv_of(pid), vmid))  # type: ignore[misc]
    _wait_until(lambda: not processes_of(vmid), KILL_WAIT)
    return len(pids)


def _wait_until(condition: Callable[[], bool], limit: float) -> bool:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


def cleanup_sandbox(sandbox_id: str, run_dir: Path) -> bool:
    """Remove everything of a sandbox whose owner is gone or ending; tell whether there was anything.

    An owner that still runs after a grace time is taken for hung and killed. Takes at most some 5 seconds.

    Raises:
        VCError: something could not be removed; the text names it. Everything else was.
    """
    layout = Layout(run_dir)
    directory = layout.sandbox(sandbox_id)
    if not directory.is_dir():
        return False
    record = _record(layout, sandbox_id)
    try:
        lock = SandboxLock(directory)
    except FileNotFoundError:
        return False  # the owner finished meanwhile
    try:
        if not _wait_until(lock.acquire_nowait, OWNER_GRACE):
            _kill_owner(record)
            _wait_until(lock.acquire_nowait, KILL_WAIT)
        if record is not None:
            remove_vm(layout, record.vmid)
        remove_share(Share(layout.mounts(sandbox_id), layout.shared(sandbox_id)))
        remove_directory(directory)
    finally:
        lock.release()
    return True


def _record(layout: Layout, sandbox_id: str) -> SandboxRecord | None:
    try:
        return store.load(layout, sandbox_id)
    except (NotFound, BrokenRecord):
        return None  # it died before it acquired anything, or is not ours: names are all there is


def _kill_owner(record: SandboxRecord | None) -> None:
    if record is not None:
        kill(record.owner_pid, lambda: start_ticks(record.owner_pid) == record.owner_start_ticks)


def remove_vm(layout: Layout, vmid: str) -> None:
    """Kill a VM's processes and remove its directory."""
    for name in layout.names_of(vmid):
        kill_processes(name)
    directory = layout.vm(vmid)
    if directory.exists():
        remove_directory(directory)


def remove_directory(directory: Path) -> None:
    """Remove a directory tree of ours, after everything that is mounted in it.

    Raises:
        VCError: something is still mounted there, so that deleting would reach foreign files.
    """
    unmount_below(directory)
    if unmount_below(directory):
        raise VCError(f"{str(directory)!r} still has mounts that cannot be detached; unmount them and retry")
    shutil.rmtree(directory, ignore_errors=True)
