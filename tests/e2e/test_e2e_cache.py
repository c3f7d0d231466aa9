"""Pods whose VM waited for them: taken from a server that keeps some ready, and owned from then on."""

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.conftest import MakeContainerd
from tests.harness import leaks
from tests.harness.cache import Cache, wait_until
from tests.harness.containerd import TIMEOUT
from tests.harness.processes import kill, processes_of, read_process
from tests.harness.runtimes import set_factory

IDENTITIES = """
cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id
od -An -tx1 -N16 /dev/urandom
date +%s
"""
CLOCK_TOLERANCE = 5  # seconds
TAKEN = re.compile(r"VM \w+ was VM (\w+) of the cache")
NUMBER = 2


@contextmanager
def running(cache: Cache) -> Iterator[tuple[str, str]]:
    """Run a container in a VM of the cache; gives its name, and the VM's name while it waited."""
    offset = cache.containerd.log_size()
    with cache.containerd.running() as container:
        [vmid] = TAKEN.findall(cache.containerd.log_since(offset))
        yield container, vmid


@pytest.fixture(scope="module")
def cache(make_containerd: MakeContainerd) -> Iterator[Cache]:
    with make_containerd() as containerd:
        if not containerd.runtime.is_vm:
            pytest.skip(f"{containerd.runtime.name} has no VM")
        cache = Cache(containerd)
        set_factory(
            cache.config,
            enable_template=True,
            template_path=f"{containerd.directory}/template",
            vm_cache_number=NUMBER,
            vm_cache_endpoint=str(cache.endpoint),
        )
        yield cache


def test_pods_of_the_cache_are_like_others_and_each_vm_is_given_once(cache: Cache) -> None:
    containerd = cache.containerd
    before = leaks.snapshot(containerd)
    seen: list[str] = []
    with cache.server(NUMBER) as server:
        status = cache.factory("status").stdout
        assert status.startswith(f"VM cache server pid = {server.pid}\nVM pid = ")
        assert len(re.findall(r"^VM pid = \d+ Cpu = 1 Memory = \d+MiB$", status, re.M)) == NUMBER
        assert len(re.findall(r"^pid \d+ holds \d+ MiB of the host's memory$", status, re.M)) == NUMBER + 1
        assert "vm factory is on\n" in status, "the template that they come from"
        assert containerd.runtime.run_dir is not None
        found = containerd.program("kata-runtime", "leaks", "--run-dir", str(containerd.runtime.run_dir))
        assert found.exit_status == 0, "they have an owner"
        with running(cache) as (one, first), running(cache) as (two, second):
            assert {first, second} == set(cache.made()[:NUMBER])
            for container in (one, two):
                script = f"echo $0 >/file; cat; cat /file; {IDENTITIES}"
                result = containerd.exec(container, "sh", "-c", script, container, stdin=b"input\n")
                said, name, *identities, clock = result.stdout.decode().splitlines()
                assert (said, name) == ("input", container)
                assert abs(int(clock) - time.time()) < CLOCK_TOLERANCE
                seen += identities
            assert len(set(seen)) == 6, seen
            cache.wait_made(2 * NUMBER)
            assert len(cache.waiting()) == NUMBER
    assert server.returncode == 0
    assert leaks.left_over(containerd, before) == []


def test_a_shim_or_vmm_that_is_killed_takes_its_pod_along_and_leaves_nothing(cache: Cache) -> None:
    containerd = cache.containerd
    before = leaks.snapshot(containerd)
    with cache.server(NUMBER):
        offset = containerd.log_size()
        with running(cache) as (container, _):
            vmm = containerd.task_pid(container)
            os.kill(vmm, signal.SIGKILL)
            assert containerd.wait_status(container, "STOPPED") == "STOPPED"
            assert containerd.delete_task(container) == 137
        assert f"QEMU (pid {vmm}) was killed by SIGKILL" in containerd.log_since(offset)
        with running(cache) as (container, _):
            vmm = containerd.task_pid(container)
            mine = processes_of(containerd.directory)
            [shim] = [process for process in mine if container in process.argv and "shim" in process.argv]
            kill(shim)
            wait_until(lambda: read_process(vmm) is None)
    fifos = containerd.directory / "fifo"
    shutil.rmtree(fifos)  # the client's, which had gone before
    fifos.mkdir()
    assert leaks.left_over(containerd, before) == []


def test_a_server_that_is_killed_takes_only_the_vms_along_that_nobody_has(cache: Cache) -> None:
    containerd = cache.containerd
    before = leaks.snapshot(containerd)
    with cache.server(NUMBER) as server:
        cache.wait_made(NUMBER)
        with running(cache) as (container, _):
            unsold = set(cache.waiting())
            server.kill()
            server.wait(TIMEOUT)
            wait_until(lambda: not any(read_process(pid) for pid in unsold))
            assert containerd.exec(container, "echo", "alive").stdout == b"alive\n"
            offset = containerd.log_size()
            assert containerd.run("echo", "hello").stdout == b"hello\n"
            log = containerd.log_since(offset)
            assert "no VM from the cache: no cache runs at" in log
            assert "goes on from template" in log
            refused = cache.factory("init")
            assert refused.returncode == 1
            assert "already exist.  Please stop running VMCache server and remove" in refused.stderr
            assert containerd.exec(container, "echo", "still").stdout == b"still\n"
    cache.endpoint.unlink()
    assert leaks.left_over(containerd, before) == []


def test_the_cache_ends_when_the_factory_is_destroyed_and_none_is_left(cache: Cache) -> None:
    before = leaks.snapshot(cache.containerd)
    with cache.server(NUMBER) as server:
        vmms = cache.waiting()
        assert len(vmms) == NUMBER
        assert cache.factory("destroy").stdout == "vm factory destroyed\n"
        assert server.wait(TIMEOUT) == 0
        assert not any(read_process(pid) for pid in vmms)
        assert not cache.endpoint.exists()
        assert "VM cache server is off" in cache.factory("status").stdout
    assert leaks.left_over(cache.containerd, before) == []
