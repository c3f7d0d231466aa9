"""The host runs out of memory, descriptors, processes, room on a disk: it is said, and nothing is left."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeContainerd, NoLeaks
from tests.e2e.test_e2e_crashes import wait_until
from tests.e2e.test_e2e_faults import READY, client_of
from tests.harness import cgroups, leaks
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Recorder
from tests.harness.faults import Fault
from tests.harness.prelude import Prelude
from tests.harness.runtimes import Start, set_factory

pytestmark = pytest.mark.usefixtures("vm_runtime")

MIB = 1 << 20
LITTLE_MEMORY = 32 * MIB  # for a VMM
# Takes more of the guest's memory than the host gives; the guest itself has enough.
GREEDY = ("dd", "if=/dev/zero", "of=/dev/null", "bs=300M", "count=1")


@contextmanager
def small_disk(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "small", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
        path.rmdir()


def test_a_vm_that_the_hosts_oom_killer_kills_is_said_to_be_its_victim(
    containerd: Containerd, events: Recorder, fault: Fault
) -> None:
    if why := cgroups.missing("memory"):
        pytest.skip(why)
    offset = containerd.log_size()
    with (
        cgroups.limited("memory", LITTLE_MEMORY) as group,
        fault.cleaned(),
        client_of(containerd, *READY) as (container, client),
    ):
        vmm = containerd.task_pid(container)
        (group / "cgroup.procs").write_text(str(vmm))
        fault.strikes()
        containerd.exec(container, *GREEDY)
        client.communicate(timeout=TIMEOUT)
        assert client.returncode == 137
    history = events.wait_for(container, "delete")
    ends = [event.topic for event in history if event.topic in ("/tasks/oom", "/tasks/exit")]
    assert ends[0] == "/tasks/oom", history
    assert history[-1].exit_status == 137
    said = rf"sandbox .* is gone: QEMU \(pid {vmm}\) was killed by SIGKILL; it was the host's OOM killer"
    assert re.search(rf"{said}.*Killed process {vmm} ", containerd.log_since(offset, 200_000))


@pytest.fixture(scope="module")
def limited(
    make_containerd: MakeContainerd, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Containerd, Prelude]]:
    """A containerd whose shims a test can limit."""
    prelude = Prelude(tmp_path_factory.mktemp("limited") / "programs")
    with make_containerd(programs=prelude.directory, start=Start.DIRECT) as daemon:
        daemon.run("true")  # what the daemon opens once and keeps
        yield daemon, prelude


def tried(daemon: Containerd, prelude: Prelude, line: str) -> bytes:
    """Run a container with a shim that does this first; return the error, b"" if there was none."""
    before = leaks.snapshot(daemon)
    prelude.line(line)
    result = daemon.run("echo", "works")
    assert leaks.left_over(daemon, before) == [], result
    assert (result.exit_status == 0) == (result.stdout == b"works\n"), result
    return result.stderr if result.exit_status else b""


def test_a_host_without_descriptors_is_an_error_that_says_so(limited: tuple[Containerd, Prelude]) -> None:
    """With however few the shim has to do: each two more and the creation comes a step further."""
    errors = [tried(*limited, f"ulimit -n {number}") for number in (14, 18, 22, 26)]
    assert errors[0]
    for error in filter(None, errors):
        assert b"Too many open files" in error, error
    assert tried(*limited, "") == b""


def test_a_host_without_processes_is_an_error_that_says_so(limited: tuple[Containerd, Prelude]) -> None:
    if why := cgroups.missing("pids"):
        pytest.skip(why)
    with cgroups.limited("pids", 1) as group:
        errors = []
        for number in (3, 5, 7):
            cgroups.change(group, "pids", number)
            errors.append(tried(*limited, f"echo $$ >{group}/cgroup.procs"))
        assert errors[0]
        for error in filter(None, errors):
            assert b"Resource temporarily unavailable" in error or b"can't start new thread" in error, error
    assert tried(*limited, "") == b""


def test_a_log_without_room_costs_neither_the_process_nor_its_exit_status(
    containerd: Containerd, no_leaks: NoLeaks
) -> None:
    """What does not fit is lost, which is logged; once there is room again, the log goes on."""
    offset = containerd.log_size()
    with small_disk(containerd.directory / "small", "size=256k") as directory, no_leaks():
        ballast, log = directory / "ballast", directory / "log"
        ballast.write_bytes(b"x" * (200 << 10))
        volume = containerd.directory / "signals"
        volume.mkdir()
        mount = ["--mount", f"type=bind,src={volume},dst=/volume,options=rbind:rw"]
        waiting = "touch /volume/full; while [ ! -e /volume/go ]; do sleep 0.1; done"
        script = f"head -c 500000 /dev/zero; {waiting}; echo after; exit 5"
        with containerd.running(
            "sh", "-c", script, flags=["--log-uri", f"file://{log}", *mount]
        ) as container:
            wait_until((volume / "full").exists)
            wait_until(lambda: "No space left on device" in containerd.log_since(offset, 200_000))
            assert 0 < log.stat().st_size < 100_000
            ballast.unlink()
            (volume / "go").touch()
            containerd.wait_status(container, "STOPPED")
            assert containerd.delete_task(container) == 5
        assert log.read_bytes().endswith(b"after\n")
    said = containerd.log_since(offset, 200_000)
    assert re.search(r"stdout of \S+ is lost until there is room: .*No space left on device", said)
    assert re.search(r"stdout of \S+ is written again", said)


def test_a_template_without_room_is_one_error_and_leaves_nothing(
    containerd: Containerd, no_leaks: NoLeaks
) -> None:
    config = containerd.runtime.config
    text = config.read_text()
    with small_disk(containerd.directory / "small", "size=8m") as directory, no_leaks():
        path = directory / "template"
        set_factory(config, enable_template=True, template_path=str(path))
        try:
            argv = ["kata-runtime", "--config", str(config), "factory", "init"]
            made = subprocess.run(
                argv, env=containerd.environ, capture_output=True, timeout=2 * TIMEOUT, check=False
            )
            assert made.returncode != 0
            error = made.stderr.splitlines()[-1]  # above it there may be the warning of an emulating host
            assert b"No space left on device" in error, made
            assert str(path).encode() in error, made
            assert b"Traceback" not in made.stderr, made
            assert [entry for entry in path.glob("*") if entry.is_dir()] == []
        finally:
            config.write_text(text)
