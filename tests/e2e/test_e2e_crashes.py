"""Something dies that should not: the daemon, the shim, the VM. Nobody hangs and nothing is left."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeContainerd, NoLeaks
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Recorder
from tests.harness.leaks import shim_socket
from tests.harness.processes import Process, kill, processes_of, read_process
from tests.harness.runtimes import Runtime, Start


def shim_of(containerd: Containerd, container: str) -> Process:
    """Return the process that serves `container`'s tasks."""
    found = [p for p in processes_of(containerd.directory) if container in p.argv and "shim" in p.argv]
    assert len(found) == 1, found
    return found[0]


def wait_until(condition: Callable[[], bool]) -> None:
    """Look until `condition` holds: for what nothing announces."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def forget_fifos(containerd: Containerd) -> None:
    """Remove what a client that failed leaves: it clears its fifos away only after the shim answered."""
    shutil.rmtree(containerd.directory / "fifo")
    (containerd.directory / "fifo").mkdir()


@pytest.mark.usefixtures("vm_runtime")
def test_the_end_of_a_process_is_told_although_pages_are_still_read_ahead_for_it(
    containerd: Containerd,
) -> None:
    """A detached `sh -c "exit 9"` started, and its exit never came.

    Its mount namespace had the only mount of its files, whose superblock ended with an inode still busy: a
    bug in the guest's kernel, in which the process died without becoming a zombie.
    """
    volume = containerd.directory / "big"
    volume.mkdir()
    for name in "abc":
        (volume / name).write_bytes(bytes(8 << 20))
    mount = ["--mount", f"type=bind,src={volume},dst=/volume,options=rbind:ro"]
    script = "head -c 1 /volume/a; head -c 1 /volume/b; exec head -c 1 /volume/c"
    result = containerd.run("sh", "-c", script, flags=mount)
    assert (result.exit_status, result.stdout) == (0, bytes(3)), result


def test_containers_outlive_the_daemon(make_containerd: MakeContainerd) -> None:
    with make_containerd() as daemon:
        with daemon.running() as container:
            pid = daemon.task_pid(container)
            daemon.stop_daemon()
            assert Path(f"/proc/{pid}").exists()
            daemon.start_daemon()
            assert (daemon.task_status(container), daemon.task_pid(container)) == ("RUNNING", pid)
            assert daemon.exec(container, "echo", "again").stdout == b"again\n"
            daemon.ctr("task", "kill", "--signal", "SIGKILL", container)
            assert daemon.delete_task(container, "--force") == 137
        assert daemon.run("echo", "new").stdout == b"new\n"


def test_an_exit_while_the_daemon_is_away_is_known_afterwards(make_containerd: MakeContainerd) -> None:
    with make_containerd() as daemon:
        if not daemon.runtime.is_vm and daemon.version() >= (1, 7):
            pytest.skip("its shim tells no pid of an ended task, so containerd 1.7 and later deletes it")
        volume = daemon.directory / "volume"
        volume.mkdir()
        script = "while [ ! -e /volume/go ]; do sleep 0.1; done; echo >/volume/gone; exit 17"
        mount = ["--mount", f"type=bind,src={volume},dst=/volume,options=rbind:rw"]
        with daemon.running("sh", "-c", script, flags=["--null-io", *mount]) as container:
            daemon.stop_daemon()
            (volume / "go").touch()
            wait_until((volume / "gone").exists)
            daemon.start_daemon()
            wait_until(lambda: daemon.task_status(container) == "STOPPED")
            assert daemon.delete_task(container) == 17


@pytest.mark.from_cache
def test_a_shim_that_is_killed_takes_everything_with_it(
    containerd: Containerd, vm_any: Start, events: Recorder, no_leaks: NoLeaks
) -> None:
    with no_leaks():
        container = containerd.new_id()
        client = containerd.popen(
            *containerd.run_arguments(
                "sh", "-c", "echo ready; sleep 1000", container=container, flags=["--rm"]
            )
        )
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        kill(shim_of(containerd, container))
        exited = events.wait_for(container, "exit")[-1]
        assert exited.exit_status in (137, 255)
        client.communicate(timeout=TIMEOUT)
        assert client.returncode != 0
        containerd.remove(container)
        forget_fifos(containerd)
        if not containerd.runtime.is_vm:
            shim_socket(containerd, container).unlink()  # runc's shim leaves it to the next start


@pytest.mark.from_cache
def test_a_vm_that_is_killed_ends_its_container(
    containerd: Containerd, vm_runtime: Runtime, vm_any: Start, events: Recorder, no_leaks: NoLeaks
) -> None:
    with no_leaks():
        container = containerd.new_id()
        client = containerd.popen(
            *containerd.run_arguments(
                "sh", "-c", "echo ready; sleep 1000", container=container, flags=["--rm"]
            )
        )
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        arguments = containerd.exec_arguments(container, "sh", "-c", "echo ready; sleep 1000")
        process = containerd.popen(*arguments)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        vmm = read_process(containerd.task_pid(container))
        assert vmm is not None
        assert "qemu" in vmm.argv
        os.kill(vmm.pid, signal.SIGKILL)
        for waiting in (process, client):
            waiting.communicate(timeout=TIMEOUT)
            assert waiting.returncode in (137, 255)
        # One client deletes the task, perhaps before the other has asked for its process.
        forget_fifos(containerd)
    exits = [event for event in events.wait_for(container, "delete") if event.topic == "/tasks/exit"]
    assert len(exits) == 2
    assert exits[-1].body["id"] == container
