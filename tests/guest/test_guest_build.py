"""The whole build, twice: same bytes, complete manifest, and a configuration that names what was built."""

import hashlib
import json
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = CHECKOUT / "scripts" / "build_guest"
pytestmark = pytest.mark.e2e  # builds what the virtual machines boot, for real
FILES = ["vmlinux", "initrd.img", "rootfs.erofs", "guest.json"]


def run_build(out: Path, cache: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [PROGRAM, "--out", out, "--cache", cache, *more]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)


def build(out: Path, cache: Path) -> Path:
    done = run_build(out, cache)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def cache() -> Path:
    """Use the packages that a build has left, so that the test downloads nothing."""
    path = CHECKOUT / "build" / "cache"
    if not path.is_dir():
        pytest.skip("scripts/build_guest has not been run in this checkout, so its packages are not here")
    if shutil.which("mkfs.erofs") is None:
        pytest.skip("mkfs.erofs is not installed (package erofs-utils)")
    return path


@pytest.fixture(scope="module")
def built(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("first"), cache)


def test_two_builds_give_the_same_bytes(built: Path, cache: Path, tmp_path: Path) -> None:
    longer = tmp_path / "a-directory-of-another-length"
    longer.mkdir()
    again = build(longer, cache)
    for name in FILES:
        assert (built / "guest" / name).read_bytes() == (again / "guest" / name).read_bytes(), name


def test_the_manifest_describes_the_files(built: Path) -> None:
    manifest = json.loads((built / "guest" / "guest.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["architecture"] == "amd64"
    assert manifest["rootfs_type"] == "erofs"
    assert all(isinstance(parameter, str) for parameter in manifest["kernel_params"])
    assert {item["name"] for item in manifest["packages"]} >= {"crun", "busybox-static", "libc6"}
    assert [item["name"] for item in manifest["wheels"]] == ["protobuf"]
    for entry in manifest["files"].values():
        data = (built / "guest" / entry["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size_bytes"], entry["sha256"])


def test_the_configuration_names_files_that_exist(built: Path) -> None:
    configuration = tomllib.loads((built / "configuration.toml").read_text())
    hypervisor = configuration["hypervisor"]["qemu"]
    manifest = json.loads((built / "guest" / "guest.json").read_text())
    for key in ("kernel", "initrd", "image"):
        assert Path(hypervisor[key]) == built / "guest" / manifest["files"][key]["name"]
    assert hypervisor["kernel_params"].split() == manifest["kernel_params"]
    assert hypervisor["rootfs_type"] == manifest["rootfs_type"]
    assert "@" not in (built / "configuration.toml").read_text()


def test_an_agent_that_needs_what_the_guest_lacks_is_refused(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "agent", tmp_path / "source" / "agent")
    (tmp_path / "source" / "agent" / "records.py").write_text("import sqlite3\n")
    for name in ("ttrpc", "yamux", "protos"):
        (tmp_path / "source" / name).symlink_to(CHECKOUT / name)
    done = run_build(tmp_path / "out", cache, "--source", tmp_path / "source")
    assert done.returncode == 1
    assert "could not import the agent" in done.stderr
    assert "No module named 'sqlite3'" in done.stderr
    assert not (tmp_path / "out" / "guest" / "rootfs.erofs").exists()
