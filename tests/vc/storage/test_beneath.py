"""Mount points in a hostile image: made inside of it or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from vc.oci.mounts import FileKind, HostFile, MountPoint, mount_points, plan_mounts
from vc.storage.beneath import make_mount_points


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "file").touch()
    for name, target in (
        ("absolute", "/etc"),
        ("upwards", "../../../../../../etc"),
        ("chain", "absolute"),
        ("out", str(tmp_path / "outside")),
        ("loop", "loop"),
        ("magic", "/proc/self/root"),
    ):
        (root / name).symlink_to(target)
    return root


@pytest.mark.parametrize(
    ("path", "is_directory", "made"),
    [
        ("/proc", True, "proc"),
        ("/a/b/c", True, "a/b/c"),
        ("/a/name", False, "a/name"),
        ("/etc/name", False, "etc/name"),
        ("/absolute/name", False, "etc/name"),
        ("/upwards/deep/er", True, "etc/deep/er"),
        ("/chain/name", False, "etc/name"),
    ],
)
def test_a_mount_point_is_made_where_the_container_finds_it(
    root: Path, path: str, is_directory: bool, made: str
) -> None:
    before = sorted(root.parent.iterdir())
    make_mount_points(root, [MountPoint(path, is_directory)])
    place = root / made
    assert place.is_dir() if is_directory else place.is_file()
    assert not place.is_symlink()
    assert sorted(root.parent.iterdir()) == before


@pytest.mark.parametrize("path", ["/out", "/out/x", "/loop/x", "/file/x", "/magic/x", "/" + "n" * 300])
def test_what_cannot_be_made_is_left_alone_and_the_next_one_made(root: Path, path: str) -> None:
    before = {str(entry.relative_to(root)) for entry in root.rglob("*")}
    make_mount_points(root, [MountPoint(path), MountPoint("/next")])
    after = {str(entry.relative_to(root)) for entry in root.rglob("*")}
    assert after - before == {"next"}
    assert [entry.name for entry in root.parent.iterdir()] == ["root"]


def test_what_is_there_stays_as_it_is(root: Path) -> None:
    (root / "file").write_text("kept")
    make_mount_points(root, [MountPoint("/file", is_directory=True), MountPoint("/etc", is_directory=False)])
    assert (root / "file").read_text() == "kept"
    assert (root / "etc").is_dir()


def test_a_root_needs_the_points_that_are_not_in_another_mount() -> None:
    kinds = {"/src": FileKind.DIRECTORY, "/src/file": FileKind.FILE, "/dev/null": FileKind.CHARACTER}
    spec = {
        "process": {"cwd": "home/here"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
            {"destination": "/data", "type": "bind", "source": "/src"},
            {"destination": "/data/inner", "type": "bind", "source": "/src"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/src/file"},
            {"destination": "/null", "type": "bind", "source": "/dev/null"},
            {"destination": "/cpus", "type": "bind", "source": "/proc/cpuinfo"},
        ],
    }

    def look(path: str) -> HostFile | None:
        return HostFile(kinds[path]) if path in kinds else None

    assert mount_points(spec, plan_mounts(spec, look)) == [
        MountPoint("/home/here"),
        MountPoint("/proc"),
        MountPoint("/dev"),
        MountPoint("/data"),
        MountPoint("/etc/hosts", is_directory=False),
        MountPoint("/null", is_directory=False),
    ]


RENAMES = """
import os, sys
a, b = sys.argv[1:]
os.mkdir(a)
print(flush=True)
while True:
    os.rename(a, b)
    os.rename(b, a)
"""


def test_renames_elsewhere_on_the_host_keep_no_mount_point_from_being_made(
    root: Path, tmp_path: Path
) -> None:
    """The kernel gives up a path with ".." when anything is renamed meanwhile, and the point was missing."""
    argv = [sys.executable, "-c", RENAMES, str(tmp_path / "a"), str(tmp_path / "b")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None and busy.stdout.readline()
            make_mount_points(root, [MountPoint(f"/upwards/point{number}") for number in range(500)])
        finally:
            busy.kill()
    assert len(list((root / "etc").iterdir())) == 500
