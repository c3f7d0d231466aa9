"""One container, from `ctr run` to its end."""

import hashlib
import os
import platform
import re
import resource
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import NoLeaks
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Recorder
from tests.harness.runtimes import Runtime, Start
from tests.harness.terminal import Terminal

MIB = 1 << 20


def test_a_container_in_a_vm_has_a_kernel_of_its_own(containerd: Containerd) -> None:
    result = containerd.run("uname", "-r")
    assert (result.exit_status, result.stderr) == (0, b"")
    same = result.stdout.decode().strip() == platform.release()
    assert same != containerd.runtime.is_vm


def test_a_container_that_may_use_a_processor_gets_one_beside_the_default_one(
    containerd: Containerd, vm_runtime: Runtime
) -> None:
    """A guest with two processors now and then never booted: test_accelerator.py tells why."""
    processors = min(2, os.cpu_count() or 1)
    script = f"nproc; for n in 1 {processors}; do taskset $n sh -c 'echo here'; done"
    result = containerd.run("sh", "-c", script, flags=["--cpus", "1"])
    assert result.stdout == b"%d\nhere\nhere\n" % processors, result
    assert result.exit_status == 0


@pytest.mark.from_cache
def test_both_outputs_and_the_exit_status_arrive(containerd: Containerd, vm_any: Start) -> None:
    result = containerd.run("sh", "-c", "echo out; echo err >&2; exit 42")
    assert (result.stdout, result.stderr, result.exit_status) == (b"out\n", b"err\n", 42)


def test_a_program_that_does_not_exist_is_an_error_and_leaves_nothing(
    containerd: Containerd, no_leaks: NoLeaks
) -> None:
    with no_leaks():
        result = containerd.run("/no/such/program")
    assert result.exit_status != 0
    assert re.search(rb"no such file|not found", result.stderr), result


@pytest.mark.from_cache
def test_stdin_reaches_the_container_and_its_end_too(containerd: Containerd, vm_any: Start) -> None:
    data = os.urandom(3 * MIB)
    result = containerd.run("cat", stdin=data)
    assert result.exit_status == 0
    assert result.stdout == data


def test_a_burst_right_before_the_exit_is_not_lost(containerd: Containerd) -> None:
    script = "dd if=/dev/zero bs=1M count=8 2>/dev/null | tr '\\0' x; exit 7"
    result = containerd.run("sh", "-c", script)
    assert result.exit_status == 7
    assert len(result.stdout) == 8 * MIB
    assert result.stdout == b"x" * (8 * MIB)


@pytest.mark.parametrize(("signal", "exit_status"), [("SIGTERM", 143), ("SIGKILL", 137)])
def test_a_killed_container_has_the_exit_status_of_the_signal(
    containerd: Containerd,
    vm_any: Start,
    events: Recorder,
    no_leaks: NoLeaks,
    signal: str,
    exit_status: int,
) -> None:
    with no_leaks():
        container = containerd.new_id()
        # The shell is pid 1, which a signal without a handler does not end; its child is ended by the default
        # action, and the shell passes on the status.
        script = "sleep 1000 & trap 'kill -TERM $!' TERM; echo ready; wait $!; wait $!"
        client = containerd.popen(
            *containerd.run_arguments("sh", "-c", script, container=container, flags=["--rm"])
        )
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        containerd.ctr("task", "kill", "--signal", signal, container)
        client.communicate(timeout=TIMEOUT)
        assert client.returncode == exit_status
    exits = [event for event in events.wait_for(container, "delete") if event.topic == "/tasks/exit"]
    assert [event.exit_status for event in exits] == [exit_status]


def test_events_come_in_their_order(containerd: Containerd, events: Recorder) -> None:
    container = containerd.new_id()
    assert containerd.run("true", container=container).exit_status == 0
    events.wait_for(container, "delete")
    assert events.topics(container) == ["create", "start", "exit", "delete"]
    created, started, exited, deleted = events.of(container)
    assert exited.body["id"] == container
    pids = {event.body["pid"] for event in (created, started, exited, deleted)}
    assert len(pids) == 1
    assert pids != {0}


def test_a_terminal_carries_input_output_and_size(containerd: Containerd) -> None:
    container = containerd.new_id()
    script = (
        "trap 'echo size $(stty size)' WINCH; stty -echo; echo ready; read line; echo got $line; "
        "while :; do sleep 1000 & wait $!; done"
    )
    arguments = containerd.run_arguments("sh", "-c", script, container=container, flags=["--rm", "--tty"])
    with Terminal(containerd, *arguments, rows=30, columns=90) as terminal:
        terminal.expect("ready\r*\n")
        terminal.send("hello\n")
        terminal.expect("got hello\r*\n")
        terminal.resize(41, 123)
        terminal.expect("size 41 123\r*\n")
        containerd.ctr("task", "kill", "--signal", "SIGKILL", container)
        assert terminal.wait() == 137


def test_a_bind_mount_is_seen_from_both_sides(containerd: Containerd, tmp_path: Path) -> None:
    directory = tmp_path / "volume"
    directory.mkdir()
    (directory / "from-host").write_text("of the host")
    mounts = ["--mount", f"type=bind,src={directory},dst=/volume,options=rbind:rw"]
    result = containerd.run(
        "sh", "-c", "cat /volume/from-host; printf guest >/volume/from-guest", flags=mounts
    )
    assert (result.stdout, result.exit_status) == (b"of the host", 0), result
    assert (directory / "from-guest").read_text() == "guest"


def test_a_volume_has_more_files_than_the_daemon_may_open(containerd: Containerd) -> None:
    """Symptom of peers: "too many open files". The server of the shared files has one open for each known."""
    volume = containerd.directory / "many-files"
    volume.mkdir()
    for number in range(3000):
        (volume / str(number)).touch()
    soft, hard = resource.prlimit(containerd.daemon_pid, resource.RLIMIT_NOFILE)
    resource.prlimit(containerd.daemon_pid, resource.RLIMIT_NOFILE, (1024, hard))
    try:
        mounts = ["--mount", f"type=bind,src={volume},dst=/volume,options=rbind:rw"]
        result = containerd.run("sh", "-c", "ls -l /volume | grep -c ^-", flags=mounts)
    finally:
        resource.prlimit(containerd.daemon_pid, resource.RLIMIT_NOFILE, (soft, hard))
        shutil.rmtree(volume)
    assert (result.stdout, result.stderr, result.exit_status) == (b"3000\n", b"", 0), result


def test_a_read_only_root_and_a_read_only_mount_refuse_writes(containerd: Containerd) -> None:
    directory = containerd.directory / "read-only-volume"
    directory.mkdir()
    flags = ["--read-only", "--mount", f"type=bind,src={directory},dst=/mnt,options=rbind:ro"]
    # The mount point does not exist in the image: it is made before the root becomes read-only.
    script = "touch /file; echo $?; touch /mnt/file; echo $?"
    result = containerd.run("sh", "-c", script, flags=flags)
    assert result.stdout == b"1\n1\n", result
    assert list(directory.iterdir()) == []


def test_user_directory_and_environment_are_those_that_were_asked_for(containerd: Containerd) -> None:
    flags = ["--cwd", "/tmp", "--env", "GREETING=good morning"]
    result = containerd.run("sh", "-c", 'pwd; echo "$GREETING"; cat /proc/1/comm; id -u', flags=flags)
    assert result.stdout == b"/tmp\ngood morning\nsh\n0\n", result


def test_a_container_beyond_its_memory_is_killed_and_that_is_told_first(
    containerd: Containerd, events: Recorder
) -> None:
    container = containerd.new_id()
    flags = ["--memory-limit", str(32 * MIB)]
    result = containerd.run("tail", "/dev/zero", container=container, flags=flags)
    assert result.exit_status == 137, result
    events.wait_for(container, "delete")
    topics = events.topics(container)
    assert topics.index("oom") < topics.index("exit"), topics


def test_a_client_that_reads_slowly_gets_everything(containerd: Containerd, shared: str) -> None:
    container = containerd.new_id()
    script = "dd if=/dev/zero bs=64k count=64 2>/dev/null; echo end >&2"
    client = containerd.popen(
        *containerd.run_arguments("sh", "-c", script, container=container, flags=["--rm"])
    )
    assert client.stdout is not None
    first = os.read(client.stdout.fileno(), 1)
    # While nobody reads on, the rest of the world goes on.
    assert containerd.exec(shared, "echo", "meanwhile").stdout == b"meanwhile\n"
    assert containerd.task_status(container) == "RUNNING"
    rest, errors = client.communicate(timeout=TIMEOUT)
    assert (len(first + rest), errors, client.returncode) == (4 * MIB, b"end\n", 0)


def test_detached_and_deleted_later(containerd: Containerd, events: Recorder, no_leaks: NoLeaks) -> None:
    with no_leaks():
        with containerd.running("sh", "-c", "exit 9") as container:
            events.wait_for(container, "exit")
            assert containerd.task_status(container) == "STOPPED"
            gone = containerd.ctr("task", "kill", "--signal", "SIGTERM", container, check=False)
            assert gone.exit_status != 0
            assert b"not found" in gone.stderr, gone
            assert containerd.delete_task(container) == 9
        events.wait_for(container, "delete")  # events leave after the answers
        assert events.topics(container) == ["create", "start", "exit", "delete"]


def test_output_of_a_pipe_between_two_containers(containerd: Containerd) -> None:
    """Two clients joined by the host's pipe, as in a shell: the second sees the end of the first."""
    script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"
    first = containerd.popen(
        *containerd.run_arguments("sh", "-c", script, container=containerd.new_id(), flags=["--rm"])
    )
    second = containerd.popen(
        *containerd.run_arguments("sha256sum", container=containerd.new_id(), flags=["--rm"]),
        stdin=first.stdout,
    )
    assert first.stdout is not None
    first.stdout.close()
    first.stdout = None  # the second client's now
    output, errors = second.communicate(timeout=TIMEOUT)
    _, first_errors = first.communicate(timeout=TIMEOUT)
    assert (first.returncode, second.returncode, first_errors, errors) == (0, 0, b"", b"")
    expected = hashlib.sha256(b"".join(b"line %d\n" % number for number in range(20000))).hexdigest()
    assert output.split()[0].decode() == expected


def test_the_null_io_of_a_detached_container_needs_no_client(containerd: Containerd) -> None:
    script = "yes | head -c 1000000; touch /tmp/through; sleep 1000"
    with containerd.running("sh", "-c", script, flags=["--null-io"]) as container:
        # The output went nowhere and blocked nobody: the shell comes to its next command.
        script = "while [ ! -e /tmp/through ]; do sleep 0.1; done; echo seen"
        assert containerd.exec(container, "sh", "-c", script).stdout == b"seen\n"


def test_stopping_a_client_does_not_stop_its_container(containerd: Containerd) -> None:
    container = containerd.new_id()
    client = containerd.popen(
        *containerd.run_arguments("sh", "-c", "echo ready; sleep 1000", container=container)
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        client.kill()
        client.communicate()
        assert containerd.exec(container, "echo", "alive").stdout == b"alive\n"
    finally:
        containerd.remove(container)
