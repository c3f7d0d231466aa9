"""The directory that the guest sees: bind mounts are made in `mounts` and exported through `shared`.

`shared` is a read-only slave of `mounts`. Read-only holds for the directory itself, so that the guest cannot
alter a mount point or plant an entry beside one; what is mounted below keeps its own flags. Slave means that
a mount made on the host appears to the guest, and never the other way round.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vc.errors import InvalidArgument, VCError
from vc.oci.mounts import MountPoint
from vc.storage.beneath import make_mount_points
from vc.storage.mounts import (
    MS_BIND,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REMOUNT,
    MS_SHARED,
    MS_SLAVE,
    Mount,
    bind,
    mount,
    mount_all,
    set_propagation,
    unmount_below,
)

GUEST_SHARE = PurePosixPath("/run/kata-containers/shared/containers")  # Kata's mount point of the share
ROOTFS = "rootfs"
STAGE = "stage"
MAX_SHOWN = 100  # bytes of a volume's own name in that of its mount point, which has 255 (limits.h, NAME_MAX)


@dataclass(frozen=True, slots=True)
class Share:
    """The two views of one sandbox's shared directory."""

    mounts: Path
    shared: Path

    def rootfs(self, container_id: str) -> Path:
        """Where the host mounts a container's root."""
        return self.mounts / container_id / ROOTFS

    def stage(self, container_id: str) -> Path:
        """Where a container's root is put together, out of the guest's sight."""
        return self.mounts.with_name(STAGE) / container_id

    def guest_rootfs(self, container_id: str) -> str:
        """Where the guest finds it."""
        return str(GUEST_SHARE / container_id / ROOTFS)

    def guest_path(self, host_path: Path) -> str:
        """Translate a path below `mounts` to the guest's."""
        return str(GUEST_SHARE / host_path.relative_to(self.mounts))


@contextmanager
def shared_directory(share: Share) -> Iterator[Share]:
    """Prepare both views for the length of the block."""
    try:
        _prepare(share)
        yield share
    finally:
        remove(share)


def _prepare(share: Share) -> None:
    try:
        for directory in (share.mounts, share.shared):
            directory.mkdir(mode=0o700)
        mount(str(share.mounts), share.mounts, "", MS_BIND)
        set_propagation(
            share.mounts, MS_PRIVATE
        )  # its own peer group, not that of the file system it lies on
        set_propagation(share.mounts, MS_SHARED)
        mount(str(share.mounts), share.shared, "", MS_BIND)
        set_propagation(share.shared, MS_SLAVE)
        mount("", share.shared, "", MS_BIND | MS_REMOUNT | MS_RDONLY)
    except OSError as exc:
        raise VCError(f"cannot prepare the shared directory {str(share.shared)!r}: {exc.strerror}") from exc


def remove(share: Share) -> None:
    """Detach every mount, then remove what is left. Safe to run twice."""
    for directory in (share.shared, share.mounts, share.mounts.with_name(STAGE)):
        unmount_below(directory)
        # With all mounts gone only our own empty mount points are left. A mount that could not be detached
        # must not have its content deleted, so nothing recursive is done while one is there.
        if directory.exists() and not unmount_below(directory):
            shutil.rmtree(directory, ignore_errors=True)


def check_root(root: Path) -> None:
    """Refuse a root file system that is not there. Raises: InvalidArgument."""
    if not root.is_dir():
        raise InvalidArgument(f"the container's root {str(root)!r} is no directory on the host")


@contextmanager
def container_rootfs(
    share: Share,
    container_id: str,
    mounts: Sequence[Mount],
    root: Path,
    *,
    read_only: bool,
    mount_points: Sequence[MountPoint] = (),
) -> Iterator[str]:
    """Give a container's root to the guest for the length of the block; yield its path there.

    `mounts` are containerd's entries. Without any, `root` is mounted already (docker, CRI-O) and is bound.
    `mount_points` are those that a read-only root must have.

    Raises:
        InvalidArgument: there is no root.
        VCError: it cannot be mounted.
    """
    target, stage = share.rootfs(container_id), share.stage(container_id)
    target.mkdir(mode=0o755, parents=True)
    try:
        if mounts:
            # Elsewhere first: what changes on a mount that the guest sees already, changes on the host only.
            stage.mkdir(mode=0o700, parents=True)
            mount_all(mounts, stage)
        else:
            check_root(root)
            stage = root
        if read_only:
            make_mount_points(stage, mount_points)
        _bind_volume(stage, target, read_only=read_only)
        _clear_stage(share, container_id)
        yield share.guest_rootfs(container_id)
    finally:
        _clear_stage(share, container_id)
        unmount_below(target)
        _remove_mount_point(target)
        _remove_mount_point(target.parent)


def _clear_stage(share: Share, container_id: str) -> None:
    stage = share.stage(container_id)
    unmount_below(stage)
    _remove_mount_point(stage)
    _remove_mount_point(stage.parent)


@contextmanager
def volume(
    share: Share, container_id: str, source: Path, *, read_only: bool, recursive: bool = True
) -> Iterator[str]:
    """Give a directory or file to the guest for the length of the block; yield its path there.

    `recursive`: with what is mounted below it.

    Raises:
        InvalidArgument: there is nothing at `source`.
    """
    # For a human who looks; so cut to what a name can hold, and to what the guest can be told: UTF-8.
    shown = os.fsencode(source.name)[:MAX_SHOWN].decode(errors="ignore") or "root"
    target = share.mounts / f"{container_id}-{secrets.token_hex(8)}-{shown}"
    if source.is_dir():
        target.mkdir(mode=0o755)
    elif source.exists():
        target.touch(mode=0o644)
    else:
        raise InvalidArgument(f"mount source {str(source)!r} does not exist on the host")
    try:
        _bind_volume(source, target, read_only=read_only, recursive=recursive)
        yield share.guest_path(target)
    finally:
        unmount_below(target)
        _remove_mount_point(target)


def _bind_volume(source: Path, target: Path, *, read_only: bool, recursive: bool = True) -> None:
    try:
        bind(source, target, read_only=read_only, recursive=recursive)
    except OSError as exc:
        raise VCError(f"cannot share {str(source)!r} with the guest: {exc.strerror}") from exc


def _remove_mount_point(path: Path) -> None:
    """Remove an empty directory or file; never what a mount shows."""
    try:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except OSError:
        pass  # not empty or busy: the sandbox's own clean-up has the last word
