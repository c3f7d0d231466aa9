"""The shared directory, seen from another mount namespace: that is where virtiofsd stands."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vc.errors import InvalidArgument
from vc.oci.mounts import MountPoint
from vc.storage.mounts import MS_SHARED, Mount, mount, mounted_below, unmount_below
from vc.storage.share import Share, container_rootfs, shared_directory, volume

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


class Elsewhere:
    """A shell in a mount namespace that was made after the share and before what is mounted in it."""

    def __init__(self, shell: "subprocess.Popen[str]") -> None:
        self._shell = shell

    def says(self, command: str) -> list[str]:
        assert self._shell.stdin is not None and self._shell.stdout is not None
        self._shell.stdin.write(f"{{ {command}; }} 2>&1; echo end\n")
        self._shell.stdin.flush()
        return [line.rstrip() for line in iter(self._shell.stdout.readline, "end\n")]


@contextmanager
def shell() -> Iterator[Elsewhere]:
    argv = ["unshare", "--mount", "--propagation", "slave", "sh"]
    with subprocess.Popen(argv, stdin=-1, stdout=-1, text=True) as process:
        found = Elsewhere(process)
        found.says("true")  # from here on it has its namespace
        yield found
        process.communicate()


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Share]:
    with shared_directory(Share(tmp_path / "mounts", tmp_path / "shared")) as share:
        yield share
    assert mounted_below(tmp_path) == []
    assert not share.mounts.exists() and not share.shared.exists() and not share.stage("").exists()


@pytest.fixture
def entries(tmp_path: Path) -> list[Mount]:
    """Return a root as containerd orders it: a layer, and another one to write to."""
    (tmp_path / "image" / "etc").mkdir(parents=True)
    return [Mount("bind", str(tmp_path / "image"), "", ("rbind", "rw"))]


def test_a_root_appears_and_can_be_written_to(share: Share, entries: list[Mount], tmp_path: Path) -> None:
    with shell() as elsewhere, container_rootfs(share, "c1", entries, tmp_path, read_only=False) as root:
        assert root.endswith("/c1/rootfs")
        assert elsewhere.says(f"cd {share.shared}/c1/rootfs && ls && touch x && echo ok") == ["etc", "ok"]
    assert (tmp_path / "image" / "x").exists()


@pytest.mark.parametrize("mounted", ["by us", "already"])
def test_a_read_only_root_is_so_wherever_it_appears_and_has_its_mount_points(
    share: Share, entries: list[Mount], tmp_path: Path, mounted: str
) -> None:
    """Symptom: a guest could write to a read-only root. Cause: a remount does not travel with the mount."""
    root = tmp_path / "image"
    files = container_rootfs(
        share,
        "c1",
        entries if mounted == "by us" else [],
        root,
        read_only=True,
        mount_points=[MountPoint("/proc"), MountPoint("/etc/hosts", is_directory=False)],
    )
    with shell() as elsewhere, files:
        for view in (share.mounts, share.shared):
            said = elsewhere.says(f"cd {view}/c1/rootfs && ls -d proc etc/hosts && touch x")
            assert said[:2] == ["etc/hosts", "proc"]
            assert "Read-only file system" in said[2]
        assert (root / "proc").is_dir()
        (root / "y").touch()  # what the host does with it elsewhere is its own affair


def test_a_read_only_volume_is_so_wherever_it_appears_with_all_that_is_mounted_in_it(
    share: Share, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    mount("tmpfs", source / "inner", "tmpfs", 0)
    with shell() as elsewhere, volume(share, "c1", source, read_only=True) as path:
        name = path.rpartition("/")[2]
        for place in (f"{share.shared}/{name}", f"{share.shared}/{name}/inner"):
            assert "Read-only file system" in elsewhere.says(f"touch {place}/x")[0]
    subprocess.run(["umount", source / "inner"], check=True)
    assert [entry.name for entry in source.iterdir()] == ["inner"]


def test_a_container_that_goes_leaves_what_is_mounted_below_a_volume_to_the_others(
    share: Share, tmp_path: Path
) -> None:
    """Symptom: with one container of a pod gone, the others saw an empty directory instead.

    Cause: where mounts are shared, which is so on most hosts, a copy is the peer of what it was copied from.
    """
    source = tmp_path / "source"
    source.mkdir()
    mount("tmpfs", source, "tmpfs", 0)
    try:
        mount("", source, "", MS_SHARED)
        (source / "inner").mkdir()
        mount("tmpfs", source / "inner", "tmpfs", 0)
        with shell() as elsewhere, volume(share, "stays", source, read_only=False) as path:
            with volume(share, "goes", source, read_only=False):
                mount("tmpfs", source / "inner", "tmpfs", 0)  # a later one arrives, too
                (source / "inner" / "file").touch()
            assert elsewhere.says(f"ls {share.shared}/{path.rpartition('/')[2]}/inner") == ["file"]
        assert [entry.name for entry in (source / "inner").iterdir()] == ["file"]
    finally:
        unmount_below(source)


def test_what_is_written_beside_the_mounts_is_refused(
    share: Share, entries: list[Mount], tmp_path: Path
) -> None:
    with shell() as elsewhere, container_rootfs(share, "c1", entries, tmp_path, read_only=False):
        for place in (share.shared, share.shared / "c1"):
            assert "Read-only file system" in elsewhere.says(f"touch {place}/x")[0]
            assert "Read-only file system" in elsewhere.says(f"mkdir {place}/d")[0]


def test_a_root_that_is_not_there_is_refused_and_leaves_nothing(share: Share, tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidArgument, match="is no directory on the host"),
        container_rootfs(share, "c1", [], tmp_path / "none", read_only=True),
    ):
        pass
    assert list(share.mounts.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["n" * 255, "ü" * 127, "caf\udce9"], ids=["long", "long characters", "no UTF-8"]
)
def test_a_volume_may_be_called_whatever_a_host_can_call_it(share: Share, tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    source.mkdir()
    with volume(share, "c" * 76, source, read_only=True) as path:
        assert path.encode()
        assert share.mounts / Path(path).name in mounted_below(share.mounts)
