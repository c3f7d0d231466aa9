"""As much of the ELF format as the build needs: sections by name, and which libraries a program wants.

64-bit little-endian files only (gABI, chapters 4 and 5); reading only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from guest.data import BuildError
from guest.tree import Kind, Tree

ELF_MAGIC = b"\x7fELF"
SECTION_TABLE = 0x28  # e_shoff: gABI, "ELF Header"
SECTION_COUNTS = 0x3A  # e_shentsize, e_shnum, e_shstrndx
SECTION = struct.Struct(
    "<IIQQQQIIQQ"
)  # Elf64_Shdr: name, type, flags, addr, offset, size, link, info, align, entsize
PROGRAM_TABLE = 0x20  # e_phoff
PROGRAM_COUNTS = 0x36  # e_phentsize, e_phnum
PROGRAM = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr: type, flags, offset, vaddr, paddr, filesz, memsz, align
DYNAMIC = struct.Struct("<qQ")  # Elf64_Dyn
PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3  # gABI, "Program Header"
DT_NULL, DT_NEEDED, DT_STRTAB = 0, 1, 5  # gABI, "Dynamic Section"
DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF  # elf.h
VERSION_NEED = struct.Struct("<HHIII")  # elf.h, Elf64_Verneed: version, count, file, aux, next
LIBRARY_PATHS = ("usr/lib/x86_64-linux-gnu", "usr/lib")  # the loader's defaults on Debian amd64


@dataclass(frozen=True, slots=True)
class Linkage:
    """What a program or library asks the loader for."""

    interpreter: str | None
    needed: tuple[str, ...]


def section(data: bytes, name: str) -> bytes:
    """Return the bytes of a section; empty if the file has none of that name."""
    at = _section_header(data, name)
    if at is None:
        return b""
    header = SECTION.unpack_from(data, at)
    return data[header[4] : header[4] + header[5]]


def with_empty_section(data: bytes, name: str) -> bytes:
    """Return the file with that section's size set to 0; unchanged if there is none of that name."""
    at = _section_header(data, name)
    if at is None:
        return data
    header = list(SECTION.unpack_from(data, at))
    header[5] = 0
    return data[:at] + SECTION.pack(*header) + data[at + SECTION.size :]


def _section_header(data: bytes, name: str) -> int | None:
    table: int = struct.unpack_from("<Q", data, SECTION_TABLE)[0]
    size: int
    size, count, names = struct.unpack_from("<HHH", data, SECTION_COUNTS)
    names_at: int = SECTION.unpack_from(data, table + names * size)[4]
    for index in range(count):
        at = table + index * size
        start = names_at + SECTION.unpack_from(data, at)[0]
        if data[start : data.index(b"\0", start)].decode() == name:
            return at
    return None


def linkage(data: bytes) -> Linkage:
    """Read interpreter and needed libraries of an ELF file."""
    (table,) = struct.unpack_from("<Q", data, PROGRAM_TABLE)
    size, count = struct.unpack_from("<HH", data, PROGRAM_COUNTS)
    headers = [PROGRAM.unpack_from(data, table + index * size) for index in range(count)]
    interpreter: str | None = None
    needed: tuple[str, ...] = ()
    for kind, _, offset, _, _, length, _, _ in headers:
        if kind == PT_INTERP:
            interpreter = data[offset : offset + length].rstrip(b"\0").decode()
        elif kind == PT_DYNAMIC:
            items = []
            for tag, value in DYNAMIC.iter_unpack(data[offset : offset + length]):
                if tag == DT_NULL:
                    break
                items.append((tag, value))
            strings = next((_file_offset(headers, value) for tag, value in items if tag == DT_STRTAB), 0)
            needed = tuple(
                data[strings + value : data.index(b"\0", strings + value)].decode()
                for tag, value in items
                if tag == DT_NEEDED
            )
    return Linkage(interpreter, needed)


def without_library(data: bytes, library: str) -> bytes:
    """Return a library that no longer asks for another one which it names but takes no symbol from.

    Raises BuildError if it does not name it, or takes versioned symbols from it (libc's and libstdc++'s are).
    """
    (table,) = struct.unpack_from("<Q", data, PROGRAM_TABLE)
    size, count = struct.unpack_from("<HH", data, PROGRAM_COUNTS)
    headers = [PROGRAM.unpack_from(data, table + index * size) for index in range(count)]
    offset, length = next((header[2], header[5]) for header in headers if header[0] == PT_DYNAMIC)
    items = list(DYNAMIC.iter_unpack(data[offset : offset + length]))
    values = dict(items)
    strings = _file_offset(headers, values[DT_STRTAB])
    name = data.index(library.encode() + b"\0", strings) - strings
    kept = [item for item in items if item != (DT_NEEDED, name)]
    if len(kept) == len(items):
        raise BuildError(f"{library} is not among the needed libraries")
    at = _file_offset(headers, values[DT_VERNEED]) if DT_VERNEED in values else 0
    for _ in range(values.get(DT_VERNEEDNUM, 0)):
        _, _, file, _, step = VERSION_NEED.unpack_from(data, at)
        if file == name:
            raise BuildError(f"symbols of {library} are in use")
        at += step
    kept.append((DT_NULL, 0))
    dynamic = b"".join(DYNAMIC.pack(*item) for item in kept)
    return data[:offset] + dynamic + data[offset + len(dynamic) :]


def _file_offset(headers: list[tuple[int, ...]], address: int) -> int:
    for kind, _, offset, start, _, length, _, _ in headers:
        if kind == PT_LOAD and start <= address < start + length:
            return offset + address - start
    raise BuildError(f"address {address:#x} lies in no segment")


def check_libraries(tree: Tree) -> int:
    """Make sure that every program and library in the tree finds what it needs; returns their number."""
    missing: dict[str, str] = {}
    checked = 0
    for path, entry in tree.items():
        if entry.kind is not Kind.FILE or not entry.data.startswith(ELF_MAGIC) or path.endswith(".ko"):
            continue
        checked += 1
        wants = linkage(entry.data)
        if wants.interpreter and tree.resolve(wants.interpreter) is None:
            missing.setdefault(wants.interpreter, path)
        for library in wants.needed:
            if not any(tree.resolve(f"{directory}/{library}") for directory in LIBRARY_PATHS):
                missing.setdefault(library, path)
    if missing:
        lines = ", ".join(f"{library} (for {path})" for library, path in sorted(missing.items()))
        raise BuildError(f"the guest's root lacks libraries: {lines}. Add their packages to guest.toml")
    return checked
