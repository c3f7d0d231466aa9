"""Order and index of kernel modules, and the kernel image in its wrapping."""

import gzip
import lzma
import struct

import pytest
from guest.data import BuildError
from guest.kernel import Module, Modules, module_of, stripped, unpack_bzimage

ELF = b"\x7fELF" + bytes(range(256)) * 40


def module(name: str, *depends: str, aliases: tuple[str, ...] = ()) -> Module:
    """Make the smallest ELF file that has a .modinfo section."""
    info = b"".join(b"alias=%s\0" % alias.encode() for alias in aliases)
    info += b"depends=" + ",".join(depends).encode() + b"\0"
    names = b"\0.modinfo\0.shstrtab\0"
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 1, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 3, 2)
    at = 64 + 3 * 64
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, at, len(info), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, at + len(info), len(names), 0, 0, 1, 0)
    return module_of(f"kernel/drivers/{name}.ko", header + sections + info + names)


def kernel_modules() -> Modules:
    return Modules(
        [
            module("virtio_blk", "virtio", "virtio_ring", aliases=("virtio:d00000002v*",)),
            module("virtio_ring", "virtio"),
            module("virtio"),
            module("virtio-rng", "virtio", "rng-core"),
        ],
        builtin="kernel/drivers/char/hw_random/rng-core.ko\n",
    )


def names(modules: list[Module]) -> list[str]:
    return [module.name for module in modules]


def test_dependencies_come_first_and_once() -> None:
    closure = kernel_modules().closure(["virtio_blk", "virtio_ring"])
    assert names(closure) == ["virtio", "virtio_ring", "virtio_blk"]


def test_dashes_are_underscores_and_builtin_modules_need_no_file() -> None:
    assert names(kernel_modules().closure(["virtio-rng", "rng_core"])) == ["virtio", "virtio_rng"]


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(BuildError, match=r"no module ext9 \(needed by guest\.toml\)"):
        kernel_modules().closure(["ext9"])


def test_the_index_is_what_modprobe_reads() -> None:
    modules = kernel_modules()
    index = modules.index(modules.closure(["virtio_blk"]))
    assert index["modules.dep"].splitlines() == [
        "kernel/drivers/virtio.ko:",
        "kernel/drivers/virtio_blk.ko: kernel/drivers/virtio_ring.ko kernel/drivers/virtio.ko",
        "kernel/drivers/virtio_ring.ko: kernel/drivers/virtio.ko",
    ]
    assert index["modules.alias"] == "alias virtio:d00000002v* virtio_blk\n"


def test_a_packed_module_is_unpacked() -> None:
    plain = module("virtio")
    assert module_of("kernel/drivers/virtio.ko.xz", lzma.compress(plain.data)) == plain


def test_the_signature_is_taken_off() -> None:
    plain = module("virtio").data
    signature = b"signature" * 7
    # include/linux/module_signature.h: eight bytes that say how, then the length, big-endian.
    info = struct.pack(">8BI", 0, 0, 2, 0, 0, 0, 0, 0, len(signature))
    assert stripped(plain + signature + info + b"~Module signature appended~\n") == plain


def bzimage(payload: bytes) -> bytes:
    """Wrap a payload as boot.rst says: a sector of boot code, `setup_sects` of set-up, the 32-bit code."""
    image = bytearray(512 * 5)
    image[0x1F1] = 4
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 100, len(payload))
    return bytes(image) + bytes(100) + payload + bytes(1000)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(lzma.compress(ELF, check=lzma.CHECK_CRC32) + struct.pack("<I", len(ELF)), id="xz"),
        pytest.param(gzip.compress(ELF), id="gzip"),
        # Legacy lz4 frame: magic, then a block: its length, and ELF as one sequence of literals only.
        pytest.param(
            struct.pack("<II", 0x184C2102, 1 + 41 + len(ELF))
            + b"\xf0"
            + b"\xff" * ((len(ELF) - 15) // 255)
            + bytes([(len(ELF) - 15) % 255])
            + ELF
            + struct.pack("<I", len(ELF)),
            id="lz4",
        ),
    ],
)
def test_the_elf_kernel_comes_out_of_a_bzimage(payload: bytes) -> None:
    if payload.startswith(struct.pack("<I", 0x184C2102)):
        length = len(payload) - 8 - 4
        payload = payload[:4] + struct.pack("<I", length) + payload[8:]
    assert unpack_bzimage(bzimage(payload)) == ELF


def test_a_damaged_kernel_is_refused() -> None:
    packed = lzma.compress(ELF) + struct.pack("<I", len(ELF) + 1)
    with pytest.raises(BuildError, match="expected an ELF image"):
        unpack_bzimage(bzimage(packed))
    with pytest.raises(BuildError, match="no bzImage"):
        unpack_bzimage(ELF)
