"""The initrd's archive format, "newc" (kernel Documentation/driver-api/early-userspace/buffer-format.rst).

A sequence of: header of 6 magic bytes and 13 numbers of 8 hexadecimal digits, name with NUL, padding to 4
bytes, data, padding to 4 bytes. The last name is TRAILER!!!. Owner, time and inode number are constants
here.
"""

from __future__ import annotations

import stat

from guest.tree import Kind, Tree

MAGIC = "070701"  # newc without checksums: buffer-format.rst, "c_magic"
TRAILER = "TRAILER!!!"
ALIGNMENT = 4  # of headers and of data: buffer-format.rst
TYPE_BITS = {
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.FILE: stat.S_IFREG,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHARACTER_DEVICE: stat.S_IFCHR,
}


def archive(tree: Tree) -> bytes:
    """Pack a tree; same tree, same bytes."""
    out = bytearray()
    for inode, (path, entry) in enumerate(tree.items(), start=1):
        links = 2 if entry.kind is Kind.DIRECTORY else 1
        _append(out, path, inode, TYPE_BITS[entry.kind] | entry.mode, links, entry.data, entry.device)
    _append(out, TRAILER, 0, 0, 1, b"", (0, 0))
    return bytes(out)


def _append(
    out: bytearray, name: str, inode: int, mode: int, links: int, data: bytes, device: tuple[int, int]
) -> None:
    encoded = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device of the file (2), device that it is (2), name size,
    # checksum
    numbers = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(encoded), 0)
    out += MAGIC.encode() + b"".join(b"%08X" % number for number in numbers) + encoded
    out += bytes(-len(out) % ALIGNMENT)
    out += data
    out += bytes(-len(out) % ALIGNMENT)
