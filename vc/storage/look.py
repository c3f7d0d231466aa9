"""What the plan of a container's mounts asks about the host's files."""

from __future__ import annotations

import os
import stat

from vc.oci.mounts import FileKind, HostFile

_KINDS = (
    (stat.S_ISDIR, FileKind.DIRECTORY),
    (stat.S_ISREG, FileKind.FILE),
    (stat.S_ISBLK, FileKind.BLOCK),
    (stat.S_ISCHR, FileKind.CHARACTER),
    (stat.S_ISFIFO, FileKind.FIFO),
    (stat.S_ISSOCK, FileKind.SOCKET),
)


def look(path: str) -> HostFile | None:
    """Describe what is at `path`, symbolic links followed; None if there is nothing."""
    try:
        info = os.stat(path)
        system = os.statvfs(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    kind = next((kind for is_kind, kind in _KINDS if is_kind(info.st_mode)), FileKind.FILE)
    return HostFile(
        kind,
        file_system=_file_system(info.st_dev),
        file_system_bytes=system.f_blocks * system.f_frsize,
        page_bytes=system.f_bsize,
        gid=info.st_gid,
    )


def _file_system(device: int) -> str:
    """Return the type of the file system with this device number, as /proc/self/mountinfo has it."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            if fields[2] == number:  # proc(5): field 3; the type follows the lone hyphen
                return fields[fields.index("-") + 1]
    return ""
