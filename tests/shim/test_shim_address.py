"""Where a shim listens, and how a live server is told from what a dead one left."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim import address, bundle


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="shim-") as made:  # tmp_path is too long for a socket
        yield Path(made)


def test_the_path_is_where_other_shims_put_it() -> None:
    # printf %s /run/containerd/containerd.sock/default/c1 | sha256sum
    expected = "/run/containerd/s/d25aa4ef11a84e954e74a5bcff06557d0b6ea8d0c00243896f29826694bbd888"
    assert address.socket_path("/run/containerd/containerd.sock", "default", "c1") == expected


def test_the_path_depends_on_each_part() -> None:
    paths = {
        address.socket_path(*parts)
        for parts in (("/a", "n", "i"), ("/a", "n", "j"), ("/a", "m", "i"), ("/b", "n", "i"), ("", "n", "i"))
    }
    assert len(paths) == 5
    assert address.socket_path("/a/../b//c/", "n", "i") == address.socket_path("/b/c", "n", "i")


def test_a_path_that_is_too_long_is_refused() -> None:
    with pytest.raises(address.AddressError, match="longer than 106 bytes"):
        address.socket_path("/a", "n", "i", "/" + "x" * 42)
    address.socket_path("/a", "n", "i", "/" + "x" * 40)


def test_a_socket_is_for_its_owner_alone(directory: Path) -> None:
    path = directory / "new" / "s"
    sock = address.listen(str(path))
    assert sock is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert address.answers(str(path))
    sock.close()
    assert not address.answers(str(path))


def test_a_live_server_is_left_alone_and_a_dead_ones_socket_is_replaced(directory: Path) -> None:
    path = str(directory / "s")
    first = address.listen(path)
    assert first is not None
    assert address.listen(path) is None
    first.close()
    second = address.listen(path)
    assert second is not None
    assert address.answers(path)
    second.close()


def test_a_server_that_is_too_busy_to_accept_is_alive(directory: Path) -> None:
    path = str(directory / "s")
    sock = address.listen(path)
    assert sock is not None
    sock.listen(0)
    clients = [address._socket.socket(address._socket.AF_UNIX) for _ in range(2)]
    for client in clients:
        client.setblocking(False)
        try:
            client.connect(path)
        except BlockingIOError:
            pass
    assert address.answers(path)
    for each in (*clients, sock):
        each.close()


def test_what_is_no_socket_is_an_error_that_names_it(directory: Path) -> None:
    with pytest.raises(address.AddressError, match="/dev/null/s"):
        address.listen("/dev/null/s")


def test_files_in_the_bundle_are_whole_or_not_there(directory: Path) -> None:
    assert bundle.read_pid(str(directory), bundle.SHIM_PID) == 0
    bundle.write_file(str(directory), bundle.SHIM_PID, "12")
    assert bundle.read_pid(str(directory), bundle.SHIM_PID) == 12
    for text in ("-1", "1x", "9" * 20, "\udc80"):
        (directory / bundle.SHIM_PID).write_text(text, errors="surrogateescape")
        assert bundle.read_pid(str(directory), bundle.SHIM_PID) == 0
    assert address.write_address(str(directory), "/s") == "unix:///s"
    assert [path.name for path in sorted(directory.iterdir())] == ["address", "shim.pid"]


@pytest.mark.parametrize(
    ("annotations", "kind", "sandbox_id"),
    [
        ({}, bundle.SANDBOX, "c1"),
        ({"io.kubernetes.cri.container-type": "sandbox"}, bundle.SANDBOX, "c1"),
        (
            {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"},
            bundle.CONTAINER,
            "p",
        ),
        (
            {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "p"},
            bundle.CONTAINER,
            "p",
        ),
        ({"io.kubernetes.docker.type": "podsandbox"}, bundle.SANDBOX, "c1"),
    ],
)
def test_annotations_say_where_a_container_belongs(
    annotations: dict[str, str], kind: str, sandbox_id: str
) -> None:
    group = bundle.group_of(annotations, "c1")
    assert (group.kind, group.sandbox_id) == (kind, sandbox_id)


@pytest.mark.parametrize(
    "annotations",
    [
        {"io.kubernetes.cri.container-type": "vm"},
        {"io.kubernetes.cri.container-type": "container"},
        {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "../p"},
    ],
)
def test_a_pods_container_that_names_no_pod_is_an_error(annotations: dict[str, str]) -> None:
    with pytest.raises(bundle.BundleError, match=r"io\.kubernetes\.cri"):
        bundle.group_of(annotations, "c1")
