"""Libraries and sections of ELF files: this machine's own programs are the samples."""

import sys
from pathlib import Path

import pytest
from guest.data import BuildError
from guest.elf import LIBRARY_PATHS, check_libraries, linkage, section, with_empty_section, without_library
from guest.tree import Tree

PYTHON = Path("/usr/bin/python3").resolve()
LOADER = "lib64/ld-linux-x86-64.so.2"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/", LOADER).exists(),
    reason="needs a Linux of the amd64 architecture",
)


def root_with(*libraries: str) -> Tree:
    tree = Tree()
    tree.file("usr/bin/program", PYTHON.read_bytes(), 0o755)
    tree.symlink("lib64", "usr/lib64")
    tree.file("usr/lib64/ld-linux-x86-64.so.2", b"")
    for library in libraries:
        tree.file(f"{LIBRARY_PATHS[0]}/{library}", b"")
    return tree


def test_the_loader_and_the_libraries_of_a_program_are_found() -> None:
    wants = linkage(PYTHON.read_bytes())
    assert wants.interpreter == f"/{LOADER}"
    assert "libc.so.6" in wants.needed


def test_a_root_with_all_libraries_passes() -> None:
    assert check_libraries(root_with(*linkage(PYTHON.read_bytes()).needed)) == 1


def test_a_missing_library_is_named_with_who_wants_it() -> None:
    libraries = [name for name in linkage(PYTHON.read_bytes()).needed if name != "libc.so.6"]
    with pytest.raises(BuildError, match=r"libc\.so\.6 \(for usr/bin/program\)"):
        check_libraries(root_with(*libraries))


def test_a_library_whose_symbols_are_in_use_is_not_taken_away() -> None:
    with pytest.raises(BuildError, match=r"symbols of libc\.so\.6 are in use"):
        without_library(PYTHON.read_bytes(), "libc.so.6")


def test_a_section_can_be_emptied_and_the_others_stay() -> None:
    data = PYTHON.read_bytes()
    emptied = with_empty_section(data, ".comment")
    assert section(data, ".interp").rstrip(b"\0").decode() == f"/{LOADER}"
    assert section(emptied, ".interp") == section(data, ".interp")
    assert section(emptied, ".comment") == b""
    assert len(emptied) == len(data)
