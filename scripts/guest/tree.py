"""A file tree in memory: what a root file system or an initrd will hold.

The rule: only what matters to the guest is kept of a file (path, type, mode, bytes). Owners, times, inode
numbers and hard links of the source never get in, so two builds cannot differ by them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath

from guest.data import BuildError

# Debian packages still ship files in these; the guest has the merged layout of every installed Debian.
MERGED = ("bin", "sbin", "lib", "lib64")


class Kind(Enum):
    """Type of a file."""

    DIRECTORY = "directory"
    FILE = "file"
    SYMLINK = "symlink"
    CHARACTER_DEVICE = "character device"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file. `data` holds the bytes of a file or the target of a symlink; `device` is (major, minor)."""

    kind: Kind
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


class Tree:
    """Files by path (relative, without a leading slash); parents appear by themselves."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __contains__(self, path: str) -> bool:
        return path in self._entries

    def __getitem__(self, path: str) -> Entry:
        return self._entries[path]

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Yield all entries sorted by path, so a directory comes before what is in it."""
        for path in sorted(self._entries, key=lambda path: path.split("/")):
            yield path, self._entries[path]

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory."""
        self._add(path, Entry(Kind.DIRECTORY, mode))

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, Entry(Kind.FILE, mode, data))

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, Entry(Kind.SYMLINK, 0o777, target.encode()))

    def character_device(self, path: str, major: int, minor: int, mode: int) -> None:
        """Add a device node (an initrd can hold one; writing it to disk would need root)."""
        self._add(path, Entry(Kind.CHARACTER_DEVICE, mode, device=(major, minor)))

    def graft(self, path: str, other: Tree) -> None:
        """Add all of another tree below a path."""
        for name, entry in other.items():
            self._add(f"{path}/{name}", entry)

    def remove(self, path: str) -> None:
        """Take one entry out."""
        del self._entries[path]

    def resolve(self, path: str, *, depth: int = 16) -> str | None:
        """Follow symlinks in every component, as the guest's kernel will; None if it leads nowhere."""
        done = PurePosixPath()
        parts = [part for part in path.split("/") if part]
        for index, part in enumerate(parts):
            entry = self._entries.get(str(done / part))
            if entry is None:
                return None
            if entry.kind is Kind.SYMLINK:
                if depth == 0:
                    return None
                target = PurePosixPath("/") / done / entry.data.decode()
                rest = normal_path(str(target.joinpath(*parts[index + 1 :])))
                return self.resolve(rest, depth=depth - 1)
            done /= part
        return str(done)

    def write_to(self, directory: Path) -> None:
        """Write everything below an existing, empty directory."""
        for path, entry in self.items():
            target = directory / path
            if entry.kind is Kind.DIRECTORY:
                target.mkdir()
                target.chmod(entry.mode)
            elif entry.kind is Kind.FILE:
                target.write_bytes(entry.data)
                target.chmod(entry.mode)
            elif entry.kind is Kind.SYMLINK:
                target.symlink_to(entry.data.decode())
            else:
                raise BuildError(f"{path}: a {entry.kind.value} can only be put into an initrd")

    def digest(self) -> str:
        """SHA-256 over paths, types, modes and bytes."""
        total = hashlib.sha256()
        for path, entry in self.items():
            content = hashlib.sha256(entry.data).hexdigest()
            total.update(f"{path}\0{entry.kind.value}\0{entry.mode:o}\0{content}\n".encode())
        return total.hexdigest()

    def _add(self, path: str, entry: Entry) -> None:
        for parent in reversed(PurePosixPath(path).parents):
            if str(parent) != "." and str(parent) not in self._entries:
                self._entries[str(parent)] = Entry(Kind.DIRECTORY, 0o755)
        old = self._entries.get(path)
        if old is not None and old != entry and not (old.kind is entry.kind is Kind.DIRECTORY):
            raise BuildError(f"{path} comes from two places with different content")
        if old is None:
            self._entries[path] = entry


def normal_path(path: str) -> str:
    """Bring a package's path into the merged layout, without leading "/" or "./" and without ".."."""
    parts: list[str] = []
    for part in path.split("/"):
        if part in ("", "."):
            continue
        if part == "..":
            parts = parts[:-1]
        else:
            parts.append(part)
    if parts and parts[0] in MERGED:
        parts.insert(0, "usr")
    return "/".join(parts)
