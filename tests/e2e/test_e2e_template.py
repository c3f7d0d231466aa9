"""Pods whose VM goes on from a template: like any other pod, only sooner."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeContainerd
from tests.harness import leaks
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.processes import Process, kill, processes_of, read_process
from tests.harness.runtimes import Start
from vc.factory.memory import checksum

IDENTITIES = """
cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id
od -An -tx1 -N16 /dev/urandom
od -An -tx1 -N16 /dev/random
date +%s
"""
CLOCK_TOLERANCE = 5  # seconds; a guest whose clock is that of the template is off by its age


class Warm:
    """A containerd whose runtime starts VMs from a template."""

    def __init__(self, containerd: Containerd) -> None:
        self.containerd = containerd
        self.path = containerd.directory / "template"  # not the one of all tests: it is spoilt here
        containerd.runtime = replace(containerd.runtime, template_path=self.path)
        containerd.runtime.start_from(Start.TEMPLATE)
        self.config = containerd.runtime.config

    def factory_process(self, action: str) -> subprocess.Popen[bytes]:
        argv = ["kata-runtime", "--config", str(self.config), "factory", action]
        return subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.containerd.environ
        )

    def factory(self, action: str) -> str:
        process = self.factory_process(action)
        stdout, stderr = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, stderr
        return stdout.decode()

    def templates(self) -> list[Path]:
        return [path for path in self.path.glob("*") if path.is_dir()]

    def log_of(self, *command: str, flags: tuple[str, ...] = (), stdout: bytes = b"") -> str:
        """Run a container to its end and return what was logged meanwhile."""
        offset = self.containerd.log_size()
        result = self.containerd.run(*command, flags=flags)
        assert (result.exit_status, result.stdout) == (0, stdout), result
        return self.containerd.log_since(offset)

    @contextmanager
    def running(self) -> Iterator[str]:
        """Start a container from the template."""
        offset = self.containerd.log_size()
        with self.containerd.running() as container:
            assert "goes on from template" in self.containerd.log_since(offset)
            yield container


@pytest.fixture(scope="module")
def factory(make_containerd: MakeContainerd) -> Iterator[Warm]:
    with make_containerd(start=Start.DIRECT) as containerd:
        if not containerd.runtime.is_vm:
            pytest.skip(f"{containerd.runtime.name} has no VM")
        yield Warm(containerd)


@pytest.fixture
def warm(factory: Warm) -> Warm:
    """With a template that is there and good."""
    made = factory.factory_process("init")
    stdout, stderr = made.communicate(timeout=TIMEOUT)
    assert (stdout, made.returncode) == (b"vm factory initialized\n", 0), stderr
    assert b"not warmed up" not in stderr
    assert factory.factory("status").startswith("vm factory is on\n")
    return factory


def wait_until_status(warm: Warm, text: str) -> None:
    deadline = time.monotonic() + 3 * TIMEOUT  # a maker in the background lets everybody else go first
    while text not in (status := warm.factory("status")):
        assert time.monotonic() < deadline, status
        time.sleep(1)  # nothing tells; asking costs more than the maker gets


def makers(warm: Warm) -> list[Process]:
    mine = processes_of(warm.containerd.directory)
    return [process for process in mine if " factory init" in process.argv or "qemu" in process.argv]


def test_two_pods_of_a_template_have_nothing_in_common(warm: Warm) -> None:
    seen: list[str] = []
    for _ in range(2):
        offset = warm.containerd.log_size()
        result = warm.containerd.run("sh", "-c", IDENTITIES)
        assert result.exit_status == 0, result
        assert "goes on from template" in warm.containerd.log_since(offset)
        *identities, clock = result.stdout.decode().splitlines()
        assert len(identities) == 4
        assert abs(int(clock) - time.time()) < CLOCK_TOLERANCE
        seen += identities
    assert len(set(seen)) == 8, seen


def test_each_pod_has_its_own_name_files_and_streams(warm: Warm) -> None:
    with warm.running() as one, warm.running() as two:
        for container in (one, two):
            script = "echo $0 >/file; cat; cat /file"
            result = warm.containerd.exec(container, "sh", "-c", script, container, stdin=b"input\n")
            assert result.stdout == f"input\n{container}\n".encode()
        assert len({warm.containerd.task_pid(container) for container in (one, two)}) == 2


def test_three_pods_of_a_template_leave_nothing(warm: Warm) -> None:
    before = leaks.snapshot(warm.containerd)
    for number in range(3):
        assert "goes on from template" in warm.log_of("echo", str(number), stdout=b"%d\n" % number)
    assert leaks.left_over(warm.containerd, before) == []


def test_a_pod_that_needs_more_memory_is_given_it(warm: Warm) -> None:
    log = warm.log_of("true", flags=("--memory-limit", str(64 << 20)))
    assert "goes on from template" in log
    assert "has grown by 0 vCPUs and 64 MiB" in log


def test_a_pod_that_needs_more_than_the_machine_has_room_for_is_booted(warm: Warm) -> None:
    text = warm.config.read_text()
    try:
        room = re.sub(r"(?m)^default_maxmemory = .*$", "default_maxmemory = 600", text)
        assert room != text
        warm.config.write_text(room)
        log = warm.log_of("true", flags=("--memory-limit", str(256 << 20)))
    finally:
        warm.config.write_text(text)
    assert "booting: a VM from the template is too small or too large: it has 512 MiB" in log
    assert "goes on from template" not in log


def test_a_template_that_others_can_read_is_not_used(warm: Warm) -> None:
    [template] = warm.templates()
    template.chmod(0o755)
    log = warm.log_of("true")
    assert "booting: the template is not used" in log
    assert "mode 755" in log
    assert "cannot be used" in warm.factory("status")
    template.chmod(0o700)
    assert "goes on from template" in warm.log_of("true")


def test_a_damaged_template_is_thrown_away_and_made_anew_in_the_background(warm: Warm) -> None:
    [template] = warm.templates()
    with (template / "memory").open("r+b") as memory:
        memory.seek(os.lseek(memory.fileno(), 0, os.SEEK_DATA))
        byte = memory.read(1)
        memory.seek(-1, os.SEEK_CUR)
        memory.write(bytes([byte[0] ^ 1]))
    old = template.stat().st_ctime_ns  # the number of a directory that is gone may be given again
    log = warm.log_of("echo", "works", stdout=b"works\n")
    assert "is thrown away" in log
    assert "checksum" in log
    wait_until_status(warm, "vm factory is on")
    [template] = warm.templates()
    assert template.stat().st_ctime_ns != old
    assert "goes on from template" in warm.log_of("true")


def test_a_state_that_qemu_cannot_read_is_thrown_away(warm: Warm) -> None:
    """The checksum is right here, as after an error of ours: QEMU itself refuses."""
    [template] = warm.templates()
    with (template / "state").open("r+b") as state:
        state.write(b"nonsense")
        state.flush()
        damaged = checksum(state.fileno())
    manifest = json.loads((template / "manifest.json").read_text())
    manifest["state_checksum"] = damaged
    (template / "manifest.json").write_text(json.dumps(manifest))
    log = warm.log_of("true")
    assert "no VM comes out of it" in log
    assert "Not a migration stream" in log, "QEMU's own words"
    assert "no template is made, for the last one failed" in log
    assert warm.factory("status") == "vm factory is off\n"


def test_a_vm_of_a_template_that_is_killed_ends_its_container(warm: Warm) -> None:
    before = leaks.snapshot(warm.containerd)
    offset = warm.containerd.log_size()
    with warm.running() as container:
        vmm = read_process(warm.containerd.task_pid(container))
        assert vmm is not None
        assert "qemu" in vmm.argv
        os.kill(vmm.pid, signal.SIGKILL)
        deadline = time.monotonic() + TIMEOUT
        while warm.containerd.task_status(container) != "STOPPED":
            assert time.monotonic() < deadline
            time.sleep(0.05)  # nothing tells
        assert warm.containerd.delete_task(container) == 137
    assert "was killed by SIGKILL" in warm.containerd.log_since(offset)
    assert leaks.left_over(warm.containerd, before) == []


def test_a_shim_that_is_killed_takes_a_vm_of_a_template_with_it(warm: Warm) -> None:
    before = leaks.snapshot(warm.containerd)
    with warm.running() as container:
        mine = processes_of(warm.containerd.directory)
        [shim] = [process for process in mine if container in process.argv and "shim" in process.argv]
        kill(shim)
    fifos = warm.containerd.directory / "fifo"
    shutil.rmtree(fifos)  # the client's, which had gone before
    fifos.mkdir()
    assert leaks.left_over(warm.containerd, before) == []


def test_a_maker_that_is_killed_leaves_what_the_next_one_removes(warm: Warm) -> None:
    assert warm.factory("destroy") == "vm factory destroyed\n"
    assert warm.factory("status") == "vm factory is off\n"
    maker = warm.factory_process("init")
    deadline = time.monotonic() + TIMEOUT
    while not any("qemu" in process.argv for process in makers(warm)):
        assert time.monotonic() < deadline
        time.sleep(0.02)  # nothing tells
    maker.kill()
    maker.communicate(timeout=TIMEOUT)
    while makers(warm):
        assert time.monotonic() < deadline
        time.sleep(0.02)  # the kernel kills QEMU with its parent
    assert [path.name[:4] for path in warm.templates()] == ["tmp-"]
    both = [warm.factory_process("init"), warm.factory_process("init")]
    for process in both:
        assert process.communicate(timeout=TIMEOUT)[0] == b"vm factory initialized\n"
    assert len(warm.templates()) == 1, "two makers make one template"
    assert [path.name[:4] for path in warm.templates()] != ["tmp-"]
