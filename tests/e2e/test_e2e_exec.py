"""More processes in one running container; all of these share one."""

import hashlib
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness.containerd import TIMEOUT, Containerd, Result
from tests.harness.events import Recorder
from tests.harness.terminal import Terminal

MIB = 1 << 20


def test_exit_statuses_arrive(containerd: Containerd, shared: str) -> None:
    statuses = [0, 1, 2, 125, 126, 127, 128, 129, 137, 143, *range(7, 256, 31)]

    def status_of(number: int) -> int:
        return containerd.exec(shared, "sh", "-c", f"exit {number}").exit_status

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(status_of, statuses)) == statuses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGUSR1])
def test_a_process_that_dies_of_a_signal(containerd: Containerd, shared: str, number: signal.Signals) -> None:
    result = containerd.exec(shared, "sh", "-c", f"kill -{number.value} $$")
    assert result.exit_status == 128 + number


def test_a_signal_from_outside_reaches_the_exec_alone(containerd: Containerd, shared: str) -> None:
    arguments = containerd.exec_arguments(
        shared, "sh", "-c", "echo ready; exec sleep 1000", flags=["--exec-id", "victim"]
    )
    client = containerd.popen(*arguments)
    assert client.stdout is not None
    assert client.stdout.readline() == b"ready\n"
    containerd.ctr("task", "kill", "--exec-id", "victim", "--signal", "SIGTERM", shared)
    client.communicate(timeout=TIMEOUT)
    assert client.returncode == 143
    assert containerd.task_status(shared) == "RUNNING"


def test_many_at_once(containerd: Containerd, shared: str) -> None:
    def run(number: int) -> Result:
        return containerd.exec(
            shared, "sh", "-c", f"cat; echo {number} >&2; exit {number}", stdin=b"%d" % number
        )

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(run, range(32)))
    for number, result in enumerate(results):
        assert (result.stdout, result.stderr, result.exit_status) == (
            b"%d" % number,
            b"%d\n" % number,
            number,
        )


def test_a_missing_program_is_an_error_and_not_a_hang(containerd: Containerd, shared: str) -> None:
    result = containerd.exec(shared, "/no/such/program")
    assert result.exit_status != 0
    assert re.search(rb"no such file|not found", result.stderr), result
    assert containerd.exec(shared, "echo", "fine").stdout == b"fine\n"


def test_missing_programs_at_once_harm_nobody(containerd: Containerd, shared: str) -> None:
    def run(number: int) -> bool:
        result = containerd.exec(shared, "echo" if number % 2 else "/no/such/program", "x")
        return (result.exit_status == 0) == bool(number % 2)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, range(12)))


def test_an_exec_id_that_is_in_use_is_refused(containerd: Containerd, shared: str) -> None:
    flags = ["--exec-id", "taken"]
    first = containerd.popen(
        *containerd.exec_arguments(shared, "sh", "-c", "echo ready; cat", flags=flags), stdin=-1
    )
    assert first.stdout is not None
    assert first.stdout.readline() == b"ready\n"
    second = containerd.exec(shared, "true", flags=flags)
    assert second.exit_status != 0
    assert b"already exists" in second.stderr, second
    output, _ = first.communicate(b"still here", timeout=TIMEOUT)
    assert (output, first.returncode) == (b"still here", 0)
    assert containerd.exec(shared, "true", flags=flags).exit_status == 0  # free again


def test_32_mib_there_and_back(containerd: Containerd, shared: str) -> None:
    data = os.urandom(MIB) * 32
    result = containerd.exec(shared, "cat", stdin=data, timeout=4 * TIMEOUT)
    assert (result.exit_status, len(result.stdout)) == (0, len(data))
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


def test_the_guest_sees_the_bytes_that_were_sent(containerd: Containerd, shared: str) -> None:
    data = os.urandom(10 * MIB)
    result = containerd.exec(shared, "md5sum", stdin=data)
    assert result.stdout.split()[0].decode() == hashlib.md5(data).hexdigest()


def test_stderr_and_stdout_do_not_wait_for_each_other(containerd: Containerd, shared: str) -> None:
    script = "dd if=/dev/zero bs=1M count=2 2>/dev/null | tee /dev/stderr"
    result = containerd.exec(shared, "sh", "-c", script)
    assert (len(result.stdout), len(result.stderr), result.exit_status) == (2 * MIB, 2 * MIB, 0)


def test_the_exit_is_known_though_a_child_keeps_the_output_open(containerd: Containerd, shared: str) -> None:
    """The client would wait for ever for the end of the output: its delete closes it after a while."""
    arguments = containerd.exec_arguments(
        shared, "sh", "-c", "sleep 4242 & echo $!; exit 5", flags=["--exec-id", "parent"]
    )
    client = containerd.popen(*arguments)
    output, _ = client.communicate(timeout=TIMEOUT)
    assert client.returncode == 5
    assert containerd.exec(shared, "kill", "-9", output.decode().strip()).exit_status == 0


def test_events_of_an_exec_lie_between_those_of_its_container(
    containerd: Containerd, shared: str, events: Recorder
) -> None:
    flags = ["--exec-id", "observed"]
    assert containerd.exec(shared, "sh", "-c", "exit 3", flags=flags).exit_status == 3
    assert containerd.exec(shared, "true").exit_status == 0
    mine = [
        (event.topic, event.exit_status)
        for event in events.of(shared)
        if "observed" in (event.body.get("exec_id"), event.body.get("id"))
    ]
    # Whether the end of an exec has a delete event is the runtime's choice.
    assert mine[:3] == [("/tasks/exec-added", 0), ("/tasks/exec-started", 0), ("/tasks/exit", 3)]


def test_a_terminal_of_an_exec(containerd: Containerd, shared: str) -> None:
    script = "trap 'echo size $(stty size)' WINCH; tty; echo ready; while :; do sleep 1000 & wait $!; done"
    arguments = containerd.exec_arguments(
        shared, "sh", "-c", script, flags=["--tty", "--exec-id", "terminal"]
    )
    with Terminal(containerd, *arguments) as terminal:
        terminal.expect("/dev/pts/[0-9]+\r*\nready\r*\n")
        terminal.resize(50, 132)
        terminal.expect("size 50 132\r*\n")
        containerd.ctr("task", "kill", "--exec-id", "terminal", "--signal", "SIGKILL", shared)
        assert terminal.wait() == 137


def test_control_c_in_a_terminal_interrupts_the_process(containerd: Containerd, shared: str) -> None:
    script = "trap 'echo interrupted; exit 130' INT; echo ready; while :; do sleep 1000 & wait $!; done"
    arguments = containerd.exec_arguments(shared, "sh", "-c", script, flags=["--tty"])
    with Terminal(containerd, *arguments) as terminal:
        terminal.expect("ready\r*\n")
        terminal.send("\x03")
        terminal.expect("interrupted\r*\n")
        assert terminal.wait() == 130


def test_the_end_of_a_shell_is_known_though_its_background_child_keeps_the_terminal(
    containerd: Containerd, shared: str
) -> None:
    """Symptom of peers: leaving a shell that has started something in the background hangs."""
    script = "trap '' HUP; sleep 4243 & echo child $!; exit 5"
    arguments = containerd.exec_arguments(shared, "sh", "-c", script, flags=["--tty"])
    with Terminal(containerd, *arguments) as terminal:
        child = terminal.expect("child ([0-9]+)\r*\n")[1].decode()
        assert terminal.wait() == 5
    assert containerd.exec(shared, "kill", "-9", child).exit_status == 0


def test_user_and_directory_of_an_exec(containerd: Containerd, shared: str) -> None:
    result = containerd.exec(
        shared, "sh", "-c", "id -u; pwd", flags=["--user", "1000:1000", "--cwd", "/home"]
    )
    assert result.stdout == b"1000\n/home\n", result


def test_an_exec_sees_the_processes_of_its_container(containerd: Containerd, shared: str) -> None:
    result = containerd.exec(shared, "sh", "-c", "cat /proc/1/comm; ls -d /proc/self/ns >/dev/null")
    assert (result.stdout, result.exit_status) == (b"sh\n", 0)
