"""The initrd's archive and the tree behind it: same content, same bytes, and the kernel's format."""

import subprocess
from pathlib import Path

import pytest
from guest.cpio import archive
from guest.data import BuildError
from guest.tree import Kind, Tree


def sample(order: list[str]) -> Tree:
    tree = Tree()
    for name in order:
        if name == "dev/console":
            tree.character_device(name, 5, 1, 0o600)
        elif name == "bin":
            tree.symlink(name, "usr/bin")
        else:
            tree.file(name, name.encode() * 3, 0o755 if name == "init" else 0o644)
    return tree


NAMES = ["init", "dev/console", "bin", "usr/bin/tool", "usr/bin.txt"]


def test_archive_does_not_depend_on_the_order_of_adding() -> None:
    assert archive(sample(NAMES)) == archive(sample(NAMES[::-1]))


def test_archive_begins_with_the_header_of_the_format() -> None:
    tree = Tree()
    tree.file("init", b"#!x", 0o755)
    # buffer-format.rst: magic, then inode, mode, uid, gid, links, mtime, size, devices, name size, checksum.
    numbers = [1, 0o100755, 0, 0, 1, 0, 3, 0, 0, 0, 0, 5, 0]
    header = b"070701" + b"".join(f"{number:08X}".encode() for number in numbers)
    # 110 bytes of header and 5 of name are padded to 116, 3 bytes of data to 120.
    assert archive(tree).startswith(header + b"init\0\0" + b"#!x\0" + b"070701")


def test_archive_is_read_by_cpio(tmp_path: Path) -> None:
    tree = sample([name for name in NAMES if name != "dev/console"])  # a device node would need root
    try:
        subprocess.run(["cpio", "-i", "--quiet"], input=archive(tree), cwd=tmp_path, check=True)
    except FileNotFoundError:
        pytest.skip("cpio is not installed")
    assert (tmp_path / "usr/bin/tool").read_bytes() == b"usr/bin/tool" * 3
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "bin").readlink() == Path("usr/bin")


def test_parents_come_before_what_is_in_them_even_if_a_name_sorts_between() -> None:
    paths = [path for path, _ in sample(NAMES).items()]
    assert paths.index("usr/bin") < paths.index("usr/bin/tool") < paths.index("usr/bin.txt")


def test_two_contents_for_one_path_are_an_error() -> None:
    tree = sample(["init"])
    with pytest.raises(BuildError, match="init comes from two places"):
        tree.file("init", b"other")


def test_written_tree_has_the_given_modes(tmp_path: Path) -> None:
    tree = sample(["init", "bin", "usr/bin/tool"])
    tree.directory("tmp", 0o1777)
    tree.write_to(tmp_path)
    for path, entry in tree.items():
        if entry.kind is not Kind.SYMLINK:
            assert (tmp_path / path).stat().st_mode & 0o7777 == entry.mode, path


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("bin/sh", "usr/bin/busybox"),
        ("/lib64/loader", "usr/lib/loader-2"),
        ("usr/bin/nowhere", None),
        ("usr/bin/loop", None),
    ],
)
def test_links_are_followed_as_the_guest_would(path: str, end: str | None) -> None:
    tree = Tree()
    tree.symlink("bin", "usr/bin")
    tree.symlink("lib64", "usr/lib64")
    tree.symlink("usr/bin/sh", "/bin/busybox")
    tree.symlink("usr/bin/nowhere", "gone")
    tree.symlink("usr/bin/loop", "loop")
    tree.file("usr/bin/busybox", b"")
    tree.symlink("usr/lib64/loader", "../lib/loader-2")
    tree.file("usr/lib/loader-2", b"")
    assert tree.resolve(path) == end
