"""A guest's memory as a file: written without what is zero, and read back into a new memory file.

Most of a guest's memory was never touched. The saved file has holes there, and nothing is allocated for them
when it is loaded. The rule of this file: it only copies bytes between descriptors, and it blocks.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

PAGE_SIZE = 4096  # bytes
CHUNK = 1 << 20  # bytes looked at in one go
ZERO_PAGE = bytes(PAGE_SIZE)


def new_memory(size_bytes: int) -> int:
    """Return the descriptor of new anonymous memory, all zero. The caller closes it."""
    descriptor = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size_bytes)
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
            for at in range(begin, end, CHUNK):
                for first, last in _used(view, at, min(at + CHUNK, end)):
                    write_all(file, view[first:last], first)
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
    """Copy what `save_memory` wrote into new memory; return how many bytes these are."""
    size = os.fstat(file).st_size
    read = 0
    with mmap.mmap(file, size, prot=mmap.PROT_READ) as source, memoryview(source) as view:
        for begin, end in data_ranges(file):
            write_all(memory, view[begin:end], begin)
            read += end - begin
    return read


def write_all(file: int, data: memoryview, offset: int) -> None:
    """Write all of it."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
