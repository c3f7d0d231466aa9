"""Where output goes beside a client's terminal, clients that come and go, and much data; mostly in one VM."""

import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest
import trio

from protos.containerd import task_v2_pb2
from tests.e2e.test_e2e_crashes import shim_of, wait_until
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Recorder
from ttrpc.client import Client
from ttrpc.methods import service

MIB = 1 << 20
LARGE = 1024  # MiB
LONG = 20 * TIMEOUT  # seconds that only a hang exceeds, also of a guest that is emulated on a busy host
STOPPED = 30.0  # seconds
CROWD = 200  # processes
ROOM = 64 << 10  # KiB by which a guest or a shim may have grown after a crowd

# A logging program that knows no signals, as simple as one can be. Its environment has no PATH.
SIMPLE_LOGGER = """\
#!/bin/sh
exec 5>&-
/bin/cat <&3 >"$2/stdout" &
/bin/cat <&4 >"$2/stderr"
wait
echo done >"$2/done"
"""
# One that is ready only when somebody opens the fifo `gate`.
GATED_LOGGER = """\
#!{python} -IS
import os, sys
directory = sys.argv[2]
with open(f"{{directory}}/said", "w") as said:
    # Not os.environ, to which Python adds.
    given = open("/proc/self/environ").read().rstrip("\\0").split("\\0")
    print(*sys.argv[1:], *sorted(given), file=said)
os.rename(f"{{directory}}/said", f"{{directory}}/waiting")
open(f"{{directory}}/gate").close()
os.write(5, b"r")
os.close(5)
for descriptor, name in ((3, "stdout"), (4, "stderr")):
    with open(f"{{directory}}/{{name}}", "wb") as output:
        while data := os.read(descriptor, 65536):
            output.write(data)
os.rename(f"{{directory}}/waiting", f"{{directory}}/done")
"""


# One that asks for the task that it is to log.
ASKING_LOGGER = """\
exec 5>&-
export CONTAINERD_NAMESPACE=$CONTAINER_NAMESPACE
cat <&3 >"$2/stdout" &
until answer=$(ctr task ps $CONTAINER_ID 2>&1); do
    echo $answer >>"$2/asked"
    case $answer in *"not found"*) ;; *) exit 1 ;; esac
    sleep 0.1
done
echo found >>"$2/asked"
wait
echo done >"$2/done"
"""


@pytest.fixture
def logs(containerd: Containerd, request: pytest.FixtureRequest) -> Path:
    """An empty directory for what is logged."""
    directory = containerd.directory / "logs" / str(request.node.name)
    directory.mkdir(parents=True)
    return directory


def logger(directory: Path, program: str, scheme: str = "binary") -> str:
    """Install a logging program, and return its URI."""
    path = directory / "logger"
    path.write_text(program)
    path.chmod(0o755)
    return f"{scheme}://{path}?directory={directory}"


def logged_exec(container: str, uri: str, script: str, exec_id: str = "") -> list[str]:
    """Return the arguments of an exec that is logged. With it the client refuses a directory for fifos."""
    exec_id = exec_id or f"e-{secrets.token_hex(6)}"
    return ["task", "exec", "--exec-id", exec_id, "--log-uri", uri, container, "sh", "-c", script]


@contextmanager
def ended(client: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """Have a client for the length of the block, and not longer, whatever happens."""
    with client:
        try:
            yield client
        finally:
            client.kill()


def read_exactly(stream: IO[bytes] | None, size: int) -> bytes:
    assert stream is not None
    data = stream.read(size)
    assert len(data) == size, data[-1000:]
    return data


# Logs


@pytest.mark.usefixtures("vm_runtime")
@pytest.mark.parametrize("scheme", ["binary", "binary-v2"])
def test_a_logging_program_is_waited_for_and_told_whom_it_logs(
    containerd: Containerd, shared: str, logs: Path, scheme: str
) -> None:
    """Not on runc, whose shim runs no other process of the container while it waits for the program."""
    os.mkfifo(logs / "gate")
    uri = logger(logs, GATED_LOGGER.format(python=sys.executable), scheme)
    script = f"touch /tmp/gated-{scheme}; echo out; echo err >&2; exit 6"
    client = containerd.popen(*logged_exec(shared, uri, script, exec_id="logged"))
    wait_until((logs / "waiting").exists)
    assert (
        containerd.exec(shared, "test", "-e", f"/tmp/gated-{scheme}").exit_status == 1
    )  # it does not run yet
    (logs / "gate").write_text("")
    client.communicate(timeout=TIMEOUT)
    assert client.returncode == 6
    wait_until((logs / "done").exists)
    assert ((logs / "stdout").read_text(), (logs / "stderr").read_text()) == ("out\n", "err\n")
    said = f"directory {logs} CONTAINER_ID=logged CONTAINER_NAMESPACE={containerd.namespace}\n"
    assert (logs / "done").read_text() == said


@pytest.mark.usefixtures("vm_runtime")
def test_a_logging_program_of_version_2_must_say_that_it_is_ready(
    containerd: Containerd, shared: str, logs: Path
) -> None:
    """containerd 2.3 brought it: with `binary`, a program that says nothing and one that fails look alike.

    Not on runc, whose shim of an older containerd does not know it.
    """
    uri = logger(logs, SIMPLE_LOGGER, "binary-v2")
    result = containerd.ctr(*logged_exec(shared, uri, "touch /tmp/unlogged"), check=False)
    assert result.exit_status != 0
    assert b"ended without saying that it is ready" in result.stderr, result
    assert containerd.exec(shared, "test", "-e", "/tmp/unlogged").exit_status == 1


def test_a_container_with_a_logging_program_needs_no_client(
    containerd: Containerd, events: Recorder, logs: Path
) -> None:
    flags = ["--log-uri", logger(logs, SIMPLE_LOGGER)]
    with containerd.running("sh", "-c", "echo out; echo err >&2; exit 3", flags=flags) as container:
        events.wait_for(container, "exit")
        assert containerd.delete_task(container) == 3
        wait_until((logs / "done").exists)
    assert ((logs / "stdout").read_text(), (logs / "stderr").read_text()) == ("out\n", "err\n")


@pytest.mark.usefixtures("vm_runtime")
def test_a_logging_program_may_ask_for_its_task_while_that_is_being_created(
    containerd: Containerd, logs: Path
) -> None:
    """As nerdctl's does: it asks until there is a task, and takes any answer but *not found* for the end.

    Not on runc, which has created the task before anybody can ask.
    """
    environment = {name: containerd.environ[name] for name in ("PATH", "CONTAINERD_ADDRESS")}
    exports = "".join(f"export {name}={value}\n" for name, value in environment.items())
    uri = logger(logs, f"#!/bin/sh\n{exports}{ASKING_LOGGER}")
    with containerd.running("sh", "-c", "echo out; exit 3", flags=["--log-uri", uri]) as container:
        wait_until((logs / "done").exists)
        assert containerd.delete_task(container) == 3
    answers = (logs / "asked").read_text().splitlines()
    assert len(answers) > 1, "the task was there at once, so nothing was tested"
    assert all("not found" in answer for answer in answers[:-1]), answers
    assert (answers[-1], (logs / "stdout").read_text()) == ("found", "out\n")


@pytest.mark.usefixtures("vm_runtime")
def test_a_logging_program_gets_the_time_to_write_everything(
    containerd: Containerd, shared: str, logs: Path
) -> None:
    """The client deletes the process at once, when the program still has a full pipe to read.

    Not on runc, whose shim ends the program by a signal then.
    """
    script = "yes out | head -c 4194304; yes err | head -c 4194304 >&2"
    uri = logger(logs, SIMPLE_LOGGER)
    containerd.ctr(*logged_exec(shared, uri, script))
    wait_until((logs / "done").exists)
    assert ((logs / "stdout").stat().st_size, (logs / "stderr").stat().st_size) == (4 * MIB, 4 * MIB)


@pytest.mark.usefixtures("vm_runtime")
def test_a_logging_program_that_ends_early_does_not_end_the_process(
    containerd: Containerd, shared: str, logs: Path
) -> None:
    """Not on runc, whose processes hold the program's pipe themselves."""
    uri = logger(logs, "#!/bin/sh\nexec 5>&-\nexec /usr/bin/head -c 10 <&3\n")
    script = "yes | head -c 4194304 && exit 7"
    result = containerd.ctr(*logged_exec(shared, uri, script), check=False)
    assert result.exit_status == 7, result


def test_a_log_file_gets_both_outputs_and_is_appended_to(
    containerd: Containerd, shared: str, logs: Path
) -> None:
    path = logs / "made" / "on" / "demand.log"
    for word in ("first", "second"):
        script = f"echo {word} out; echo {word} err >&2"
        result = containerd.ctr(*logged_exec(shared, f"file://{path}", script))
        assert (result.stdout, result.stderr, result.exit_status) == (b"", b"", 0)
    lines = path.read_text().splitlines()
    assert sorted(lines[:2]) == ["first err", "first out"]
    assert sorted(lines[2:]) == ["second err", "second out"]


# Clients that come and go


@contextmanager
def detached(containerd: Containerd, *command: str) -> Iterator[str]:
    """Run a container with fifos that nobody holds, and with a stdin that has not ended."""
    container = containerd.new_id()
    arguments = containerd.run_arguments(*command, container=container, flags=["--detach"])
    try:
        # The client would end the container's stdin if it came to the end of its own.
        with ended(containerd.popen(*arguments, stdin=subprocess.PIPE)) as client:
            assert client.wait(TIMEOUT) == 0, client.communicate()
        yield container
    finally:
        containerd.remove(container)


def close_stdin(containerd: Containerd, container: str) -> None:
    """Call CloseIO, for which the client has no command."""
    state = containerd.directory / "state" / "io.containerd.runtime.v2.task" / containerd.namespace
    address = (state / container / "address").read_text().removeprefix("unix://")
    method = service(task_v2_pb2.DESCRIPTOR.services_by_name["Task"])["CloseIO"]

    async def call() -> None:
        async with trio.open_nursery() as nursery:
            client = Client(await trio.open_unix_socket(address))
            nursery.start_soon(client.run)
            await client.call(method, task_v2_pb2.CloseIORequest(id=container, stdin=True))
            nursery.cancel_scope.cancel()

    trio.run(call)


def test_stdin_survives_its_clients_and_ends_when_it_is_closed(containerd: Containerd) -> None:
    with detached(containerd, "cat") as container:
        for word, leave_by_end in ((b"one\n", False), (b"two\n", True)):
            with ended(containerd.popen("task", "attach", container, stdin=subprocess.PIPE)) as client:
                assert client.stdin is not None
                client.stdin.write(word)
                client.stdin.flush()
                assert read_exactly(client.stdout, len(word)) == word
                if leave_by_end:
                    client.stdin.close()
                client.kill()
        with ended(containerd.popen("task", "attach", container, stdin=subprocess.PIPE)) as client:
            assert client.stdin is not None
            client.stdin.write(b"three\n")
            client.stdin.flush()
            assert read_exactly(client.stdout, 6) == b"three\n"
            close_stdin(containerd, container)
            client.stdin.write(b"four\n")  # whoever still has the fifo open may finish
            client.stdin.close()
            client.stdin = None
            rest, _ = client.communicate(timeout=TIMEOUT)
            assert (rest, client.returncode) == (b"four\n", 0)


def test_the_output_goes_on_where_a_killed_reader_left_it(containerd: Containerd) -> None:
    last = 1_000_000
    container = containerd.new_id()
    arguments = containerd.run_arguments("seq", "1", str(last), container=container)
    try:
        with ended(containerd.popen(*arguments)) as client:
            assert client.stdout is not None
            begun = client.stdout.readline()
            client.kill()
            begun += client.stdout.read()
        assert containerd.task_status(container) == "RUNNING"  # it waits for a reader
        rest, _ = containerd.popen("task", "attach", container).communicate(timeout=TIMEOUT)
    finally:
        containerd.remove(container)
    numbers = [int(line) for line in rest.split(b"\n")[1:-1]]  # the first may be cut
    assert numbers == list(range(numbers[0], last + 1))
    # What the killed client had read and not yet written is its own affair.
    lost = (numbers[0] - int(begun.split(b"\n")[-2])) * len(str(last))
    assert 0 < lost <= 64 << 10


# Much


@pytest.fixture(scope="module")
def roomy(containerd: Containerd) -> Iterator[tuple[str, Path]]:
    """A container, and the directory of the host that it has as /volume."""
    volume = containerd.directory / "stdio-volume"
    volume.mkdir()
    flags = ["--mount", f"type=bind,src={volume},dst=/volume,options=rbind:rw"]
    with containerd.running(flags=flags) as container:
        yield container, volume
    shutil.rmtree(volume)


@contextmanager
def reader_that_stopped(containerd: Containerd, container: str) -> Iterator[Callable[[], None]]:
    """Stop the client of a process that writes 32 MiB; yield what lets it go on and looks at what came."""
    script = "head -c 33554432 /dev/urandom >/tmp/random; md5sum </tmp/random"
    checksum = containerd.exec(container, "sh", "-c", script).stdout.split()[0].decode()
    script = "echo $$ >&2; exec dd if=/tmp/random bs=65536 2>/dev/null"
    with ended(containerd.popen(*containerd.exec_arguments(container, "sh", "-c", script))) as client:
        assert client.stderr is not None
        pid = client.stderr.readline().decode().strip()
        client.send_signal(signal.SIGSTOP)
        since = time.monotonic()

        def written() -> bytes:
            return containerd.exec(container, "grep", "wchar", f"/proc/{pid}/io").stdout

        seen = [written()]

        def stands_still() -> bool:
            seen.append(written())
            return seen[-1] == seen[-2]

        def go_on() -> None:
            time.sleep(max(0.0, since + STOPPED - time.monotonic()))  # its length is what is tested
            assert written() == seen[-1]
            client.send_signal(signal.SIGCONT)
            output, errors = client.communicate(timeout=LONG)
            assert (errors, client.returncode) == (b"", 0)
            assert hashlib.md5(output).hexdigest() == checksum

        wait_until(stands_still)
        assert 0 < int(seen[-1].split()[1]) < 32 * MIB
        yield go_on


def test_a_gibibyte_of_output_arrives_in_order(containerd: Containerd, roomy: tuple[str, Path]) -> None:
    container, _ = roomy
    script = (
        f"head -c {MIB} /dev/urandom >/tmp/block; i=0; "
        f"while [ $i -lt {LARGE} ]; do cat /tmp/block; echo $i; i=$((i+1)); done"
    )
    with ended(containerd.popen(*containerd.exec_arguments(container, "sh", "-c", script))) as client:
        block = read_exactly(client.stdout, MIB)
        assert read_exactly(client.stdout, 2) == b"0\n"
        for number in range(1, LARGE):
            mark = b"%d\n" % number
            assert read_exactly(client.stdout, MIB + len(mark)) == block + mark, number
        rest, errors = client.communicate(timeout=LONG)
        assert (rest, errors, client.returncode) == (b"", b"", 0)


def test_a_gibibyte_of_input_arrives_in_order_while_another_stream_stands_still_for_half_a_minute(
    containerd: Containerd, roomy: tuple[str, Path]
) -> None:
    """Symptom of peers: a process without output for 30 s is taken for dead, or holds the others up."""
    container, volume = roomy
    block = os.urandom(MIB)
    with (volume / "sent").open("wb") as file:
        for number in range(LARGE):
            file.write(block + b"%d\n" % number)
    with reader_that_stopped(containerd, container) as go_on:
        with (volume / "sent").open("rb") as file:
            arguments = containerd.exec_arguments(
                container, "sh", "-c", "dd bs=64k of=/volume/came 2>/dev/null; echo $?"
            )
            client = containerd.popen(*arguments, stdin=file)
            answer = client.communicate(timeout=LONG)
        assert (answer, client.returncode) == ((b"0\n", b""), 0)
        subprocess.run(["cmp", volume / "sent", volume / "came"], check=True)
        go_on()


def memory_of(containerd: Containerd, container: str) -> tuple[int, int]:
    """Return what the guest uses and what the shim has resident, in KiB."""
    told = containerd.exec(container, "cat", "/proc/meminfo").stdout.decode()
    guest = {line.split(":")[0]: int(line.split()[1]) for line in told.splitlines()}
    status = Path(f"/proc/{shim_of(containerd, container).pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return guest["MemTotal"] - guest["MemAvailable"], resident


def test_two_hundred_processes_at_once(containerd: Containerd, roomy: tuple[str, Path]) -> None:
    """All live at the same time: each waits at a gate that opens when the last one has come."""
    container, _ = roomy
    assert containerd.exec(container, "mkfifo", "/tmp/gate").exit_status == 0
    before = memory_of(containerd, container)
    with ExitStack() as stack:

        def start(script: str, stdin: int = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
            arguments = containerd.exec_arguments(container, "sh", "-c", script)
            return stack.enter_context(ended(containerd.popen(*arguments, stdin=stdin)))

        clients = []
        for number in range(CROWD):
            work = f"head -c {number * 1000} /dev/zero; echo {number} >&2; exit {number}"
            clients.append(start(f"echo come; : </tmp/gate; {work}"))
        for client in clients:
            assert read_exactly(client.stdout, 5) == b"come\n"
        keeper = start("exec 3>/tmp/gate; cat", subprocess.PIPE)
        for number, client in enumerate(clients):
            output, errors = client.communicate(timeout=LONG)
            assert (len(output), output.strip(b"\0"), errors) == (number * 1000, b"", b"%d\n" % number)
            assert client.returncode == number
        keeper.communicate(timeout=TIMEOUT)
    if containerd.runtime.is_vm:
        after = memory_of(containerd, container)
        grown = [now - then for then, now in zip(before, after, strict=True)]
        assert max(grown) < ROOM, grown
