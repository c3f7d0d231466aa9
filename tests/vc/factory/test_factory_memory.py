"""Memory is saved without its zeros and comes back as it was."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vc.factory.memory import PAGE_SIZE, PIECE, checksum, load_memory, new_memory, save_memory

PAGES = 3 * PIECE // PAGE_SIZE


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.integers(0, PAGES - 1), st.sampled_from([b"\0", b"a", b"\xff"]), max_size=40))
def test_what_is_saved_comes_back(file: int, pages: dict[int, bytes]) -> None:
    memory, copy = new_memory(PAGES * PAGE_SIZE), new_memory(PAGES * PAGE_SIZE)
    try:
        for page, byte in pages.items():
            os.pwrite(memory, byte * PAGE_SIZE, page * PAGE_SIZE)
        os.ftruncate(file, 0)
        used = sum(byte != b"\0" for byte in pages.values())
        assert save_memory(memory, file) == used * PAGE_SIZE
        assert load_memory(file, copy) == checksum(file)
        assert content(copy) == content(memory)
    finally:
        os.close(memory)
        os.close(copy)


def test_nothing_is_allocated_for_zeros(file: int) -> None:
    memory, copy = new_memory(PAGES * PAGE_SIZE), new_memory(PAGES * PAGE_SIZE)
    try:
        os.pwrite(memory, b"\0" * PAGES * PAGE_SIZE, 0)  # touched, and zero again
        os.pwrite(memory, b"x", 5 * PAGE_SIZE)
        save_memory(memory, file)
        load_memory(file, copy)
        assert os.fstat(copy).st_blocks * 512 == PAGE_SIZE
        assert content(copy) == content(memory)
    finally:
        os.close(memory)
        os.close(copy)


def test_a_changed_byte_changes_the_checksum(file: int) -> None:
    memory = new_memory(PAGES * PAGE_SIZE)
    try:
        os.pwrite(memory, b"x" * PIECE, PIECE // 2)
        save_memory(memory, file)
        before = checksum(file)
        os.pwrite(file, b"y", PIECE)
        assert checksum(file) != before
    finally:
        os.close(memory)


def test_memory_keeps_its_size() -> None:
    memory = new_memory(PAGE_SIZE)
    try:
        for size in (0, 2 * PAGE_SIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(memory, size)
        assert fcntl.fcntl(memory, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    finally:
        os.close(memory)
