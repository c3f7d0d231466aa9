"""What a guest cannot boot without, read from its files."""

import struct
from pathlib import Path

import pytest

from vc.errors import InvalidArgument
from vc.hypervisor.footprint import MIB, check_memory, kernel_end

# The program headers of Debian's 6.1 cloud kernel: type, flags, offset, virtual, physical, file, memory size.
SEGMENTS = [
    (1, 5, 0x200000, 0xFFFFFFFF81000000, 0x1000000, 0x1826634, 0x1826634),
    (1, 6, 0x1C00000, 0xFFFFFFFF82A00000, 0x2A00000, 0x61A000, 0x61A000),
    (1, 6, 0x2400000, 0, 0x301A000, 0x34000, 0x34000),
    (1, 7, 0x244E000, 0xFFFFFFFF8304E000, 0x304E000, 0xDB2000, 0xDB2000),
    (4, 0, 0x1637E70, 0xFFFFFFFF82437E70, 0x2437E70, 0x200, 0x7FFFFFFF),  # a note is not loaded
]


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<16sHHIQQQIHHHHHH", identity, 2, 62, 1, 0x1000000, 64, 0, 0, 64, 56, 5, 0, 0, 0)
    table = b"".join(struct.pack("<IIQQQQQQ", *segment, 0x200000) for segment in SEGMENTS)
    path = tmp_path / "vmlinux"
    path.write_bytes(header + table)
    return path


def test_an_elf_kernel_reaches_to_the_end_of_its_last_segment(kernel: Path) -> None:
    assert kernel_end(kernel) == 62 * MIB


def test_memory_that_does_not_hold_kernel_and_initrd_is_refused_with_what_they_take(kernel: Path) -> None:
    initrd = kernel.with_name("initrd.img")
    initrd.write_bytes(bytes(600_000))
    check_memory(63, kernel, initrd)
    check_memory(62, kernel, None)
    with pytest.raises(InvalidArgument, match=r"62 MiB of memory .*initrd\.img' alone take 63; raise"):
        check_memory(62, kernel, initrd)
    with pytest.raises(InvalidArgument, match=r"vmlinux' alone take 62;"):
        check_memory(61, kernel, None)


def test_of_a_kernel_of_another_kind_only_its_size_is_known(tmp_path: Path) -> None:
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(bytes(3 * MIB))
    check_memory(3, kernel, None)
    with pytest.raises(InvalidArgument, match="alone take 3"):
        check_memory(2, kernel, None)


@pytest.mark.parametrize("cut", [0, 6, 63, 64, 100])
def test_a_file_that_ends_too_early_is_judged_by_what_there_is(kernel: Path, cut: int) -> None:
    kernel.write_bytes(kernel.read_bytes()[:cut])
    assert kernel_end(kernel) <= max(cut, 40 * MIB)


def test_a_missing_kernel_is_for_others_to_tell(tmp_path: Path) -> None:
    check_memory(1, tmp_path / "none", None)
