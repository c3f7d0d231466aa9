"""Looking at a real network namespace, from a process in it and from one outside."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from vc.network.scan import interfaces_of


@pytest.fixture
def inside() -> Iterator[int]:
    """A process in a network namespace that has a pair of interfaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and ip (iproute2)")
    script = "ip link add one type veth peer name two && echo ready && read forever"
    argv = ["unshare", "--net", "sh", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.kill()


def test_the_interfaces_of_a_process_are_those_of_its_namespace(inside: int) -> None:
    assert set(interfaces_of(inside)) == {"one", "two"}
    assert set(interfaces_of(inside, f"/proc/{inside}/ns/net")) == {"one", "two"}


def test_a_namespace_in_which_the_process_is_not_is_entered(inside: int) -> None:
    assert set(interfaces_of(os.getpid(), f"/proc/{inside}/ns/net")) == {"one", "two"}


def test_what_is_gone_has_none() -> None:
    assert interfaces_of(os.getpid(), "/run/netns/no-such-namespace") == []
    assert interfaces_of(2**22 + 1) == []
