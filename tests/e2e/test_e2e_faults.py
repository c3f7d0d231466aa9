"""Faults from all sides: each ends with the right exit, a cause in the log, and a host as it was before."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.conftest import MakeContainerd, NoLeaks
from tests.e2e.test_e2e_crashes import shim_of, wait_until
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Recorder
from tests.harness.faults import Fault
from tests.harness.processes import Process, kill, processes_of, read_process
from tests.harness.runtimes import Start
from vc.persist.store import VMM_NAME

pytestmark = pytest.mark.usefixtures("vm_runtime", "vm_any")

READY = ("sh", "-c", "echo ready; sleep 1000")
# What a container needs to reach its kernel's switches; where its file systems are read-only nevertheless.
PRIVILEGED = "mount -o remount,rw /proc 2>/dev/null; mount -o remount,rw /sys 2>/dev/null; echo ready; "
PANIC = f"{PRIVILEGED} echo c >/proc/sysrq-trigger"
# Takes away the device by which the agent is reached: the guest goes on, and QEMU has nothing to complain of.
CUT_OFF = (
    PRIVILEGED + "cd /sys/bus/virtio/drivers/virtio_console && for d in virtio*; do echo $d >unbind; done"
)
HEALTH = 'health_check_interval = 0.5\nhealth_check_timeout = 2\nrun_dir = "'


@contextmanager
def configured(containerd: Containerd, old: str, new: str) -> Iterator[None]:
    """Have the sandboxes that are created in the block read another configuration."""
    path = containerd.runtime.config
    text = path.read_text()
    changed = re.sub(r"(?m)^health_check_.*\n", "", text).replace(old, new, 1)
    assert changed != text
    path.write_text(changed)
    try:
        yield
    finally:
        path.write_text(text)


def vmid_of(containerd: Containerd, container: str) -> str:
    """Return the id that a container's VM began with: see `names_of_vm`."""
    vmm = read_process(containerd.task_pid(container))
    assert vmm is not None
    match = re.search(r"sandbox-([0-9a-f]{16})", vmm.argv)
    assert match is not None, vmm
    return match[1]


def names_of_vm(containerd: Containerd, container: str) -> set[str]:
    """Return the ids of a container's VM: it got a second one if it comes from a cache.

    The command line of each of its processes carries one of them.
    """
    first = vmid_of(containerd, container)
    assert containerd.runtime.run_dir is not None
    notes = containerd.runtime.run_dir.glob(f"vm/*/{VMM_NAME}")
    return {first, *(note.parent.name for note in notes if note.read_text() == first)}


def processes_of_vm(containerd: Containerd, *names: str) -> list[Process]:
    mine = processes_of(containerd.directory)
    return [process for process in mine if any(name in process.argv for name in names)]


@contextmanager
def client_of(
    containerd: Containerd, *command: str, flags: tuple[str, ...] = ()
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Run a container with a client that waits for it, from its first line of output on."""
    container = containerd.new_id()
    arguments = containerd.run_arguments(*command, container=container, flags=["--rm", *flags])
    with containerd.popen(*arguments) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == b"ready\n", client.communicate()
            yield container, client
        finally:
            if client.poll() is None:
                client.kill()
                containerd.remove(container)


def assert_killed(events: Recorder, container: str) -> None:
    """Both the exit and the end were announced, once."""
    history = events.wait_for(container, "delete")
    ends = [(event.topic, event.exit_status) for event in history[2:]]
    assert ends == [("/tasks/exit", 137), ("/tasks/delete", 137)]


@pytest.mark.from_cache
def test_a_virtiofsd_that_is_killed_ends_its_container(
    containerd: Containerd, events: Recorder, no_leaks: NoLeaks
) -> None:
    offset = containerd.log_size()
    with no_leaks(), client_of(containerd, *READY) as (container, client):
        found = processes_of_vm(containerd, *names_of_vm(containerd, container))
        daemons = [process for process in found if "virtiofsd" in process.argv.split()[0]]
        assert daemons, found
        for daemon in daemons:
            kill(daemon)
        client.communicate(timeout=TIMEOUT)
        assert client.returncode == 137
    assert_killed(events, container)
    assert re.search(r"virtiofsd \(pid \d+\) was killed by SIGKILL", containerd.log_since(offset))


@pytest.mark.from_cache
def test_a_kernel_panic_ends_the_container_and_its_message_is_logged(
    containerd: Containerd, events: Recorder, fault: Fault
) -> None:
    offset = containerd.log_size()
    # Not before its first line has arrived: a guest that panics takes along what it has not sent.
    script = f"trap 'echo c >/proc/sysrq-trigger' USR1; {PRIVILEGED} while :; do sleep 1000 & wait $!; done"
    with (
        fault.cleaned(),
        client_of(containerd, "sh", "-c", script, flags=("--privileged",)) as (container, client),
    ):
        fault.strikes()
        # The guest may be gone before it has answered.
        containerd.ctr("task", "kill", "--signal", "SIGUSR1", container, check=False)
        client.communicate(timeout=TIMEOUT)
        assert client.returncode == 137
    assert_killed(events, container)
    log = containerd.log_since(offset)
    assert re.search(r"sandbox .* is gone: .*last console lines: .*Kernel panic - not syncing", log)


@pytest.mark.from_cache
def test_an_agent_that_is_cut_off_is_noticed_and_its_vm_killed(
    containerd: Containerd, events: Recorder, fault: Fault
) -> None:
    offset = containerd.log_size()
    with (
        configured(containerd, 'run_dir = "', HEALTH),
        fault.cleaned(),
        client_of(containerd, *READY, flags=("--privileged",)) as (container, client),
    ):
        # Not by the container's own process, whose first line might be cut off as well.
        fault.strikes()
        process = containerd.popen(
            *containerd.exec_arguments(container, "sh", "-c", f"{CUT_OFF}; sleep 1000")
        )
        for waiting in (process, client):
            waiting.communicate(timeout=TIMEOUT)
            assert waiting.returncode == 137
    history = events.wait_for(container, "delete")
    assert [event.exit_status for event in history if event.topic == "/tasks/exit"] == [137, 137]
    assert re.search(r"sandbox .* is gone: the guest hangs: its agent did not", containerd.log_since(offset))


@pytest.mark.from_cache
def test_a_vm_that_hangs_is_killed_by_the_health_check(
    containerd: Containerd, events: Recorder, fault: Fault
) -> None:
    offset = containerd.log_size()
    with (
        configured(containerd, 'run_dir = "', HEALTH),
        fault.cleaned(),
        client_of(containerd, *READY) as (container, client),
    ):
        names = names_of_vm(containerd, container)
        process = containerd.popen(*containerd.exec_arguments(container, *READY))
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        fault.strikes()
        os.kill(containerd.task_pid(container), signal.SIGSTOP)
        for waiting in (process, client):
            waiting.communicate(timeout=TIMEOUT)
            assert waiting.returncode == 137
        assert processes_of_vm(containerd, *names) == []
    history = events.wait_for(container, "delete")
    assert [event.exit_status for event in history if event.topic == "/tasks/exit"] == [137, 137]
    log = containerd.log_since(offset)
    assert "the guest hangs: its agent did not answer a health check within 2 s" in log


def test_a_paused_container_outlives_health_checks(containerd: Containerd) -> None:
    """A container that is frozen has an agent that is not."""
    with configured(containerd, 'run_dir = "', HEALTH), containerd.running() as container:
        offset = containerd.log_size()
        containerd.ctr("task", "pause", container)
        assert containerd.run("true").exit_status == 0  # a boot takes longer than a check
        containerd.ctr("task", "resume", container)
        assert containerd.exec(container, "echo", "alive").stdout == b"alive\n"
        assert "health check" not in containerd.log_since(offset)


def booting(containerd: Containerd) -> list[Process]:
    """Return the VMMs of pods."""
    found = [process for process in processes_of(containerd.directory) if "-name sandbox-" in process.argv]
    kept = containerd.kept_vms()
    return [process for process in found if not any(vmid in process.argv for vmid in kept)]


def test_a_delete_in_the_middle_of_a_create_hurts_neither(containerd: Containerd, no_leaks: NoLeaks) -> None:
    with no_leaks():
        container = containerd.new_id()
        before = len(booting(containerd))
        client = containerd.popen(
            *containerd.run_arguments("true", container=container, flags=["--detach", "--null-io"])
        )
        wait_until(lambda: len(booting(containerd)) > before)
        early = containerd.ctr("task", "rm", "--force", container, check=False)
        _, errors = client.communicate(timeout=TIMEOUT)
        assert b"not found" in early.stderr, early  # there is no task before it is created
        assert client.returncode == 0, errors
        containerd.remove(container)
        assert containerd.task_status(container) is None


def test_a_client_that_dies_in_the_middle_of_a_create_leaves_nothing(
    containerd: Containerd, no_leaks: NoLeaks
) -> None:
    with no_leaks():
        container = containerd.new_id()
        before = len(booting(containerd))
        client = containerd.popen(
            *containerd.run_arguments("true", container=container, flags=["--detach", "--null-io"])
        )
        wait_until(lambda: len(booting(containerd)) > before)
        client.kill()
        client.communicate(timeout=TIMEOUT)
        wait_until(lambda: len(booting(containerd)) == before)
        containerd.remove(container)
        assert containerd.task_status(container) is None


@pytest.mark.from_cache
def test_two_deletes_at_once_delete_once(containerd: Containerd, events: Recorder, no_leaks: NoLeaks) -> None:
    with no_leaks(), containerd.running(*READY, flags=["--null-io"]) as container:
        clients = [containerd.popen("task", "rm", "--force", container) for _ in range(2)]
        ends = [(client.communicate(timeout=TIMEOUT)[1], client.returncode) for client in clients]
        assert 0 in [status for _, status in ends], ends
        assert all(status == 0 or b"not found" in errors for errors, status in ends), ends
        history = events.wait_for(container, "delete")
        assert [event.topic for event in history].count("/tasks/delete") == 1
        assert [event.exit_status for event in history if event.topic == "/tasks/exit"] == [137]


def of_another_daemon(line: str) -> bool:
    """Tell whether what is left may differ only because the daemon was restarted."""
    return line.startswith(("descriptor", "child"))


def test_after_a_power_loss_the_restarted_daemon_cleans_everything(
    make_containerd: MakeContainerd, vm_any: Start, request: pytest.FixtureRequest
) -> None:
    with make_containerd(start=vm_any) as daemon:
        daemon.run("true")  # what the daemon opens once and keeps
        fault = Fault(daemon, request.node.name)
        with fault.cleaned(of_another_daemon):
            container = daemon.new_id()
            daemon.ctr(*daemon.run_arguments(*READY, container=container, flags=["--detach", "--null-io"]))
            mine = processes_of_vm(daemon, *names_of_vm(daemon, container))
            assert len(mine) >= 2, mine
            fault.strikes()
            for process in (*mine, shim_of(daemon, container)):
                kill(process)
            daemon.stop_daemon(kill=True)
            daemon.start_daemon()
            wait_until(lambda: daemon.task_status(container) is None)
            daemon.ctr("container", "rm", container)
        assert daemon.run("echo", "again").stdout == b"again\n"


def test_a_run_dir_without_room_is_a_clear_error_and_nothing_is_left(
    containerd: Containerd, no_leaks: NoLeaks
) -> None:
    """However many files still fit: with each one more the creation comes one step further."""
    run_dir = containerd.directory / "full"
    run_dir.mkdir()
    old = f'run_dir = "{containerd.runtime.run_dir}"'
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=3,mode=700", "full", run_dir], check=True)
    try:
        for name in ("sbs", "vm"):
            (run_dir / name).mkdir()
        failures = 0
        with configured(containerd, old, f'run_dir = "{run_dir}"'), no_leaks():
            for free in range(20):
                options = f"remount,nr_inodes={3 + free}"
                subprocess.run(["mount", "-o", options, run_dir], check=True)
                result = containerd.run("true")
                assert list(run_dir.glob("*/*")) == []
                if result.exit_status == 0:
                    break
                assert b"No space left on device" in result.stderr, (free, result)
                failures += 1
        assert 3 <= failures < 20
    finally:
        subprocess.run(["umount", run_dir], check=True)
        run_dir.rmdir()


# Root of the guest, by the kernel: the program that takes core dumps runs outside of all containers.
# It overwrites the code that the agent runs, for the agent is process 1, which no signal kills.
KILLER = b"""\
#!/bin/busybox sh
exec 2>/dev/kmsg >&2
echo killing the agent
while read -r range rights offset device inode path; do
    case $rights:$path in r-xp:*/libc.so*)
        at=$((0x${range%-*} / 4096)) size=$((0x${range#*-} / 4096 - at))
        dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$at count=$size conv=notrunc ;;
    esac
done </proc/1/maps
"""


def agent_killer(container: str) -> tuple[str, ...]:
    """Return the command by which a privileged container kills the agent. KILLER is its stdin."""
    # Where the guest's own processes find the container's files.
    program = f"/run/kata-containers/shared/containers/{container}/rootfs/killer"
    return (
        "sh",
        "-c",
        PRIVILEGED
        + "cat >/killer; chmod 755 /killer; "
        + f"echo '|{program}' >/proc/sys/kernel/core_pattern; "
        + "sh -c 'kill -SEGV $$'; sleep 1000",
    )


def test_an_agent_that_dies_takes_its_guest_along_and_its_kernels_last_words_are_logged(
    containerd: Containerd, events: Recorder, fault: Fault
) -> None:
    offset = containerd.log_size()
    with fault.cleaned(), client_of(containerd, *READY, flags=("--privileged",)) as (container, client):
        fault.strikes()
        killing = containerd.exec(container, *agent_killer(container), stdin=KILLER)
        assert killing.exit_status == 137, killing
        client.communicate(timeout=TIMEOUT)
        assert client.returncode == 137
    history = events.wait_for(container, "delete")
    assert [event.exit_status for event in history if event.topic == "/tasks/exit"] == [137, 137]
    log = containerd.log_since(offset)
    assert re.search(r"sandbox .* is gone: .*last console lines: .*Attempted to kill init", log)
