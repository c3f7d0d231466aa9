from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vc.errors import InvalidArgument, VCError
from vc.storage.mounts import (
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    MS_SLAVE,
    Mount,
    Options,
    mount_all,
    mounted_below,
    parse_options,
    unmount,
    unmount_below,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Options(0, 0, "", False)),
        (["ro", "nosuid", "nodev"], Options(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, "", False)),
        (["ro", "rw"], Options(0, 0, "", False)),
        (["rbind", "rslave"], Options(MS_BIND | MS_REC, MS_SLAVE | MS_REC, "", False)),
        (["index=off", "lowerdir=/a:/b"], Options(0, 0, "index=off,lowerdir=/a:/b", False)),
        (["loop", "ro"], Options(MS_RDONLY, 0, "", True)),
        (["X-containerd.mkdir.path=/x", "ro"], Options(MS_RDONLY, 0, "", False)),
    ],
)
def test_mount_words_are_sorted_into_flags_propagation_and_data(words: list[str], expected: Options) -> None:
    assert parse_options(words) == expected


@needs_root
def test_entries_are_mounted_in_order_and_found_deepest_first(tmp_path: Path) -> None:
    lower, root = tmp_path / "lower", tmp_path / "root"
    (lower / "etc").mkdir(parents=True)
    (lower / "etc/name").write_text("x")
    root.mkdir()
    try:
        mount_all(
            [
                Mount("bind", str(lower), "", ("rbind", "ro")),
                Mount("tmpfs", "tmpfs", "etc", ("size=4096",)),
            ],
            root,
        )
        assert mounted_below(root) == [root / "etc", root]
        assert list((root / "etc").iterdir()) == []
        with pytest.raises(OSError, match="Read-only"):
            (root / "new").touch()
    finally:
        assert unmount_below(root) == 2
    assert mounted_below(root) == []
    assert (lower / "etc/name").read_text() == "x"


@needs_root
def test_a_failing_entry_undoes_those_before_it_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(VCError, match=r"no-such-fs"):
        mount_all([Mount("tmpfs", "tmpfs"), Mount("no-such-fs", "nothing")], tmp_path)
    assert mounted_below(tmp_path) == []


@needs_root
def test_a_target_outside_the_root_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(InvalidArgument, match=r"leaves the root"):
        mount_all([Mount("tmpfs", "tmpfs", "../outside")], root)
    assert mounted_below(tmp_path) == []


@needs_root
def test_an_overlay_with_more_layers_than_a_page_holds_is_mounted(tmp_path: Path) -> None:
    layers = []
    for index in range(60):
        layer = tmp_path / ("snapshots" * 10) / str(index) / "fs"
        layer.mkdir(parents=True)
        (layer / f"file{index}").touch()
        layers.append(str(layer))
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir()
    words = (f"workdir={tmp_path}/work", f"upperdir={tmp_path}/upper", f"lowerdir={':'.join(layers)}")
    assert len(",".join(words)) > 4096
    supported = subprocess.run(["grep", "-q", "overlay", "/proc/filesystems"], check=False).returncode == 0
    if not supported:
        pytest.skip("this kernel has no overlay file system")
    root = tmp_path / "root"
    mount_all([Mount("overlay", "overlay", "", words)], root)
    try:
        assert len(list(root.iterdir())) == 60
    finally:
        unmount_below(root)


@needs_root
def test_mount_points_with_blanks_and_backslashes_are_found(tmp_path: Path) -> None:
    odd = tmp_path / "a b\\c\td"
    odd.mkdir()
    mount_all([Mount("tmpfs", "tmpfs")], odd)
    assert mounted_below(tmp_path) == [odd]
    assert unmount_below(tmp_path) == 1


@needs_root
@pytest.mark.parametrize(
    "link", ["/outside", "../../outside", "../../../../../../{outside}", "/proc/self/cwd"]
)
def test_a_symbolic_link_in_an_image_does_not_lead_a_mount_out_of_it(tmp_path: Path, link: str) -> None:
    """The path was once resolved as the host's: an image's own absolute links were refused by luck alone."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    root.mkdir()
    (root / "var").symlink_to(link.format(outside=str(outside)[1:]))
    (root / "outside").mkdir()  # where an absolute link leads in the container
    try:
        with contextlib.suppress(VCError):  # a link to nowhere
            mount_all([Mount("tmpfs", "tmpfs", "var/sub")], root)
        if link == "/outside":
            assert mounted_below(root) == [root / "outside/sub"]
    finally:
        unmount_below(root)
    assert mounted_below(tmp_path) == []
    assert list(outside.iterdir()) == [outside / "sub"]
    assert list((outside / "sub").iterdir()) == []


@needs_root
def test_a_directory_that_becomes_a_link_while_it_is_mounted_on_leads_nowhere(tmp_path: Path) -> None:
    """A guest that shares the root swaps it between the look at a path and its use."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    root.mkdir()
    swapper = (
        "import ctypes, os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "os.mkdir('dir'); os.symlink(sys.argv[2], 'link')\n"
        "print('swapping', flush=True)\n"
        "here, exchange = -100, 2\n"  # linux/fcntl.h, AT_FDCWD; linux/fs.h, RENAME_EXCHANGE
        "while ctypes.CDLL(None).renameat2(here, b'dir', here, b'link', exchange) == 0: pass\n"
    )
    argv = [sys.executable, "-c", swapper, str(root), str(outside)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    done = 0
    try:
        assert process.stdout is not None and process.stdout.readline() == b"swapping\n"
        for _ in range(300):
            with contextlib.suppress(VCError):
                mount_all([Mount("tmpfs", "tmpfs", "dir/sub")], root)
                done += 1
            assert mounted_below(outside) == []
            unmount_below(root)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
        unmount_below(tmp_path)
    assert done
    assert list((outside / "sub").iterdir()) == []


@needs_root
@pytest.mark.parametrize("link", ["directory", "mounted"])
def test_what_lies_behind_a_link_is_not_unmounted(tmp_path: Path, link: str) -> None:
    """A container that makes a link of a directory above a mount had the mount behind the link undone."""
    outside = tmp_path / "directory" / "mounted"
    outside.mkdir(parents=True)
    root = tmp_path / "root"
    root.mkdir()
    mount_all([Mount("tmpfs", "tmpfs", "", ())], outside)
    try:
        (root / link).symlink_to(tmp_path / "directory" if link == "directory" else outside)
        assert not unmount(root / link / "mounted" if link == "directory" else root / link)
        assert mounted_below(outside) == [outside]
    finally:
        assert unmount(outside)
    assert mounted_below(outside) == []
