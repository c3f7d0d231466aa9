"""The guest's kernel: the ELF image out of a bzImage, and which modules need which.

A bzImage spends its first part of the boot on unpacking itself. QEMU starts the ELF image inside it directly
(PVH entry), so it is unpacked here, once. Layout: kernel Documentation/x86/boot.rst, section "The real-mode
kernel header".
"""

from __future__ import annotations

import ctypes
import gzip
import lzma
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from guest.data import BuildError
from guest.elf import ELF_MAGIC, section, with_empty_section

SETUP_SECTORS = 0x1F1  # boot.rst: setup_sects, one byte
HEADER_MAGIC = 0x202  # boot.rst: "HdrS"
PAYLOAD = 0x248  # boot.rst: payload_offset and payload_length, 4 bytes each
SECTOR_BYTES = 512
LZ4_LEGACY_MAGIC = 0x184C2102  # lz4_Frame_format.md, "Legacy frame"
SIGNATURE_END = b"~Module signature appended~\n"  # include/linux/module_signature.h
SIGNATURE_INFO = struct.Struct(">8xI")  # struct module_signature: its last field is the signature's length
LZ4_LEGACY_BLOCK = 8 << 20  # bytes a block unpacks to at most: lz4_Frame_format.md, "Legacy frame"


def unpack_bzimage(image: bytes) -> bytes:
    """Return the ELF kernel in a bzImage."""
    if image[HEADER_MAGIC : HEADER_MAGIC + 4] != b"HdrS":
        raise BuildError("the kernel is no bzImage (no HdrS at 0x202)")
    setup_sectors = image[SETUP_SECTORS] or 4  # boot.rst: 0 means 4
    offset, length = struct.unpack_from("<II", image, PAYLOAD)
    start = (setup_sectors + 1) * SECTOR_BYTES + offset
    payload = image[start : start + length]
    # The kernel's build appends the unpacked size to the payload (scripts/Makefile.lib, size_append).
    body, (size,) = payload[:-4], struct.unpack("<I", payload[-4:])
    for magic, unpack in UNPACKERS.items():
        if body.startswith(magic):
            kernel = unpack(payload if magic == b"\x1f\x8b" else body, size)
            break
    else:
        raise BuildError(f"the kernel is packed in an unknown way (it begins with {body[:6].hex()})")
    if len(kernel) != size or not kernel.startswith(ELF_MAGIC):
        raise BuildError(f"unpacking the kernel gave {len(kernel)} bytes, expected an ELF image of {size}")
    return kernel


def _unpack_gzip(data: bytes, size: int) -> bytes:
    return gzip.decompress(data)  # gzip ends in its size anyway, nothing was appended


def _unpack_xz(data: bytes, size: int) -> bytes:
    return lzma.decompress(data)


def _unpack_lz4(data: bytes, size: int) -> bytes:
    try:
        library = ctypes.CDLL("liblz4.so.1")
    except OSError as exc:
        raise BuildError("liblz4.so.1 is missing: apt-get install liblz4-1") from exc
    out = bytearray()
    buffer = ctypes.create_string_buffer(LZ4_LEGACY_BLOCK)
    offset = 4
    while offset + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, offset)
        block = data[offset + 4 : offset + 4 + length]
        got = library.LZ4_decompress_safe(block, buffer, len(block), LZ4_LEGACY_BLOCK)
        if got <= 0:
            raise BuildError(f"the kernel's lz4 block at {offset} is damaged")
        out += buffer.raw[:got]
        offset += 4 + length
    return bytes(out)


UNPACKERS: Mapping[bytes, Callable[[bytes, int], bytes]] = {
    struct.pack("<I", LZ4_LEGACY_MAGIC): _unpack_lz4,
    b"\xfd7zXZ\0": _unpack_xz,
    b"\x1f\x8b": _unpack_gzip,
}


@dataclass(frozen=True, slots=True)
class Module:
    """One kernel module. `path` is relative to the modules directory of its kernel."""

    name: str
    path: str
    data: bytes

    def depends(self) -> tuple[str, ...]:
        """Return the names of the modules that must be loaded before it."""
        return tuple(
            normal_name(name) for line in self._info("depends") for name in line.split(",") if name.strip()
        )

    def aliases(self) -> tuple[str, ...]:
        """Return the patterns by which the kernel asks for it."""
        return tuple(self._info("alias"))

    def _info(self, key: str) -> Iterator[str]:
        for item in section(self.data, ".modinfo").split(b"\0"):
            name, _, value = item.partition(b"=")
            if name.decode() == key:
                yield value.decode()


def normal_name(name: str) -> str:
    """Module names treat "-" and "_" as one character."""
    return name.replace("-", "_")


class Modules:
    """The modules of one kernel."""

    def __init__(self, modules: Iterable[Module], builtin: str) -> None:
        """`builtin` is the text of modules.builtin."""
        self._modules = {module.name: module for module in modules}
        self._builtin = {_name_of(line) for line in builtin.split()}

    def closure(self, names: Iterable[str]) -> list[Module]:
        """Return the modules with all they depend on, dependencies first, each once, no built-in ones."""
        order: dict[str, Module] = {}

        def visit(name: str, needed_by: str) -> None:
            if name in order or name in self._builtin:
                return
            module = self._modules.get(name)
            if module is None:
                raise BuildError(f"the kernel has no module {name} (needed by {needed_by})")
            for dependency in module.depends():
                visit(dependency, name)
            order[name] = module

        for name in names:
            visit(normal_name(name), "guest.toml")
        return list(order.values())

    def index(self, modules: Iterable[Module]) -> dict[str, str]:
        """Return modules.dep and modules.alias for modprobe, by file name."""
        dep, alias = [], []
        for module in sorted(modules, key=lambda module: module.path):
            before = [need.path for need in reversed(self.closure([module.name])) if need is not module]
            dep.append(f"{module.path}: {' '.join(before)}".rstrip())
            alias += [f"alias {pattern} {module.name}" for pattern in sorted(set(module.aliases()))]
        return {"modules.dep": "\n".join(dep) + "\n", "modules.alias": "\n".join(alias) + "\n"}


def module_of(path: str, data: bytes) -> Module:
    """Make a module of a file `kernel/….ko` or `kernel/….ko.xz`."""
    if path.endswith(".xz"):
        path, data = path.removesuffix(".xz"), lzma.decompress(data)
    return Module(_name_of(path), path, data)


def stripped(data: bytes) -> bytes:
    """Take signature and type information off a module: checking and parsing them takes longer than the rest.

    The kernel does not insist on signatures (CONFIG_MODULE_SIG_FORCE is off), and whoever could replace a
    module in the guest's image could replace the kernel beside it. The types (BTF) are for tracing tools.
    """
    if data.endswith(SIGNATURE_END):
        end = len(data) - len(SIGNATURE_END) - SIGNATURE_INFO.size
        (length,) = SIGNATURE_INFO.unpack_from(data, end)
        data = data[: end - length]
    return with_empty_section(data, ".BTF")


def is_module(path: str) -> bool:
    """Tell a module by its file name."""
    return path.endswith((".ko", ".ko.xz"))


def _name_of(path: str) -> str:
    return normal_name(path.rsplit("/", 1)[-1].split(".")[0])
