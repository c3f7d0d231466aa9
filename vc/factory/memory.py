"""A guest's memory as a file: written without what is zero, and read back into a new memory file.

Most of a guest's memory was never touched. The saved file has holes there, and nothing is allocated for them
when it is loaded. The rule of this file: it only copies bytes between descriptors, and it blocks.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import zlib
from collections.abc import Iterator

PAGE_SIZE = 4096  # bytes
PIECE = 256 << 10  # bytes: what a processor's cache holds easily
SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
ZERO_PAGE = bytes(PAGE_SIZE)


def new_memory(size_bytes: int) -> int:
    """Return the descriptor of new anonymous memory, all zero. The caller closes it."""
    descriptor = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        # As QEMU seals its own: whoever maps it can rely on its size.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def data_ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of what is not a hole: lseek(2)."""
    end = 0
    while True:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole
                return
            raise
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end


def save_memory(memory: int, file: int) -> int:
    """Write the pages that are not zero to `file`, at their places; return how many bytes these are."""
    size = os.fstat(memory).st_size
    os.ftruncate(file, size)
    written = 0
    with mmap.mmap(memory, size, prot=mmap.PROT_READ) as source, memoryview(source) as view:
        for begin, end in data_ranges(memory):
            for first, last in _used(view, begin, end):
                with view[first:last] as data:
                    write_all(file, data, first)
                written += last - first
    return written


def _used(view: memoryview, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of pages that are not zero."""
    first = -1
    for at in range(begin, end, PAGE_SIZE):
        zero = view[at : at + PAGE_SIZE] == ZERO_PAGE
        if zero and first >= 0:
            yield first, at
            first = -1
        elif not zero and first < 0:
            first = at
    if first >= 0:
        yield first, end


def load_memory(file: int, memory: int) -> int:
    """Copy what `save_memory` wrote into new memory; return its checksum."""
    total = 0
    for at, data in _pieces(file):
        # First the checksum: then the bytes are in the processor's cache for the copy.
        total = zlib.crc32(data, total)
        write_all(memory, data, at)
    return total


def checksum(file: int) -> int:
    """Return the checksum of a file's data. It tells damage, not malice."""
    total = 0
    for _, data in _pieces(file):
        total = zlib.crc32(data, total)
    return total


def _pieces(file: int) -> Iterator[tuple[int, memoryview]]:
    """Yield what is not a hole, with its place; each piece is valid until the next one."""
    # Read, not mapped: an error of the disk is an exception then, and not the end of this process.
    with memoryview(bytearray(PIECE)) as buffer:
        for begin, end in data_ranges(file):
            at = begin
            while at < end:
                size = os.preadv(file, [buffer[: min(PIECE, end - at)]], at)
                if not size:
                    return  # it was truncated
                yield at, buffer[:size]
                at += size


def write_all(file: int, data: memoryview, offset: int) -> None:
    """Write all of it."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
