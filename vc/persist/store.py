"""Sandbox directories on disk: one lock, one record, replaced atomically.

The process that runs a sandbox holds the lock as long as the sandbox lives. Whoever gets the lock of a
sandbox that it did not create knows that its owner is gone and may clean up.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vc.errors import AlreadyExists, NotFound, VCError
from vc.persist.schema import MAX_RECORD_BYTES, BrokenRecord, SandboxRecord, format_record, parse_record

RECORD = "persist.json"
TEMPORARY = ".tmp"  # its suffix until it is whole
LOCK = "lock"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
VMM_NAME = "name"  # in a VM's directory: what its VMM is called, if not as the directory


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things of sandboxes and VMs are, below `run_dir`."""

    run_dir: Path

    @property
    def sandboxes(self) -> Path:
        """Directory of all sandboxes."""
        return self.run_dir / "sbs"

    @property
    def vms(self) -> Path:
        """Directory of all VMs."""
        return self.run_dir / "vm"

    def sandbox(self, sandbox_id: str) -> Path:
        """Directory of one sandbox."""
        return self.sandboxes / sandbox_id

    def vm(self, vmid: str) -> Path:
        """Directory of one VM: its sockets."""
        return self.vms / vmid

    def names_of(self, vmid: str) -> set[str]:
        """Return the names that a VM's processes may have. Reads a file."""
        try:
            noted = (self.vm(vmid) / VMM_NAME).read_text()
        except (OSError, ValueError):
            return {vmid}
        return {vmid, noted} if noted else {vmid}  # the disk may have been full when it was noted

    def mounts(self, sandbox_id: str) -> Path:
        """Where the host makes the bind mounts that the guest is to see."""
        return self.sandbox(sandbox_id) / "mounts"

    def shared(self, sandbox_id: str) -> Path:
        """The read-only view of `mounts` that virtiofsd exports."""
        return self.sandbox(sandbox_id) / "shared"


class SandboxLock:
    """An exclusive lock on a sandbox directory, held until `release` or the end of the process."""

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @classmethod
    def held(cls, descriptor: int) -> SandboxLock:
        """Own a lock that is held already: by `descriptor`, which another process has sent."""
        lock = cls.__new__(cls)
        lock._fd = descriptor
        return lock

    def fileno(self) -> int:
        """Return the descriptor, which holds the lock wherever a copy of it is open: flock(2)."""
        return self._fd

    def acquire_nowait(self) -> bool:
        """Take the lock if it is free."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Give the lock back. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def make_private(directory: Path) -> None:
    """Create a directory that only its owner may enter, and such parents if there are none."""
    for path in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
        path.mkdir(mode=0o700, exist_ok=True)  # with parents=True they would be open to all


def check_ours(directory: Path) -> None:
    """Refuse a directory that others own or can write to: what is in it could be replaced by them.

    Raises: PermissionError, also for the directory above, where `run_dir` may be a place that all can use.
    """
    for path in (directory.parent, directory):
        found = path.stat()
        if found.st_uid != os.geteuid() or found.st_mode & OTHERS_WRITE:
            why = f"{str(path)!r} belongs to user {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):o}"
            raise PermissionError(errno.EPERM, f"others can change what is there: {why}")


def claim(layout: Layout, sandbox_id: str) -> SandboxLock:
    """Create the directory of a new sandbox and take its lock; the caller releases it.

    Raises:
        AlreadyExists: a sandbox of this id is alive, or its remains were not cleaned up.
        VCError: the directory cannot be written to; nothing is left in it then.
    """
    directory = layout.sandbox(sandbox_id)
    try:
        make_private(layout.sandboxes)
        check_ours(layout.sandboxes)
        directory.mkdir(mode=0o700)
    except FileExistsError:
        raise AlreadyExists(
            f"sandbox {sandbox_id!r} already exists in {str(layout.sandboxes)!r}; "
            "delete it first, or run the shim's delete action if its shim is gone"
        ) from None
    except OSError as exc:
        raise _unwritable(directory, exc) from exc
    try:
        lock = SandboxLock(directory)
    except OSError as exc:
        forget(layout, sandbox_id)
        raise _unwritable(directory, exc) from exc
    if not lock.acquire_nowait():
        lock.release()
        raise AlreadyExists(f"sandbox {sandbox_id!r} is being created by another process")
    return lock


def save(layout: Layout, record: SandboxRecord) -> None:
    """Replace the record of a sandbox atomically. Raises VCError if it cannot be written."""
    path = layout.sandbox(record.id) / RECORD
    temporary = path.with_suffix(TEMPORARY)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(format_record(record))
            file.flush()
        temporary.replace(path)
    except OSError as exc:
        raise _unwritable(path, exc) from exc


def _unwritable(path: Path, exc: OSError) -> VCError:
    return VCError(
        f"the state of a sandbox cannot be kept at {str(path)!r}: {exc.strerror}; "
        "mend that, or set run_dir to another directory"
    )


def load(layout: Layout, sandbox_id: str) -> SandboxRecord:
    """Read the record of a sandbox.

    Raises:
        NotFound: there is no such sandbox, or it died before it wrote its record.
        BrokenRecord: the file is there and is not a record.
    """
    path = layout.sandbox(sandbox_id) / RECORD
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"no sandbox {sandbox_id!r} in {str(layout.sandboxes)!r}") from None
    if len(data) > MAX_RECORD_BYTES:
        raise BrokenRecord(f"{str(path)!r} has more than {MAX_RECORD_BYTES} bytes")
    return parse_record(data)


def forget(layout: Layout, sandbox_id: str) -> None:
    """Remove a sandbox's record, lock and directory; what else is in it stays. Safe to run twice."""
    directory = layout.sandbox(sandbox_id)
    record = directory / RECORD
    for path in (record, record.with_suffix(TEMPORARY), directory / LOCK):
        path.unlink(missing_ok=True)
    try:
        directory.rmdir()
    except OSError:
        pass  # something could not be unmounted: the delete action finds it there


def sandbox_ids(layout: Layout) -> Iterator[str]:
    """List the ids of all sandboxes that have a directory."""
    if layout.sandboxes.is_dir():
        for entry in sorted(layout.sandboxes.iterdir()):
            if entry.is_dir():
                yield entry.name
