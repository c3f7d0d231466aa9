"""containerd goes away while its pods live on: every event and every exit is known afterwards."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeContainerd
from tests.e2e.test_e2e_crashes import shim_of, wait_until
from tests.e2e.test_e2e_fault_states import created, exec_open, paused, pod_in, stopped
from tests.e2e.test_e2e_faults import booting, of_another_daemon
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Event, Recorder
from tests.harness.faults import Fault
from tests.harness.prelude import Prelude
from tests.harness.processes import kill, read_process
from tests.harness.relay import Relay
from tests.harness.runtimes import Start

MUCH = 1 << 20  # bytes of log: a daemon that starts has much to tell
WORK = ("sh", "-c", "trap 'exit 5' TERM; while :; do sleep 1000 & wait $!; done")


@pytest.fixture(scope="module")
def programs() -> Path | None:
    """Where daemon and client are, if they are not those on PATH."""
    return None


@pytest.fixture(scope="module")
def short(programs: Path | None) -> Iterator[Path]:
    """A directory with a short name, for sockets; another one for other programs."""
    with tempfile.TemporaryDirectory(prefix="kata-far-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def events_socket(short: Path) -> Path:
    return short / "events.sock"


@pytest.fixture(scope="module", name="daemon")
def daemon_with_far_events(
    make_containerd: MakeContainerd, programs: Path | None, short: Path, events_socket: Path
) -> Iterator[Containerd]:
    """A containerd whose shims find its socket for events elsewhere."""
    prelude = Prelude(short / "programs", beside=programs)
    with make_containerd(programs=prelude.directory) as daemon:
        if not daemon.runtime.is_vm:
            pytest.skip(f"{daemon.runtime.name} has no VM")
        prelude.line(f"export TTRPC_ADDRESS={events_socket}")
        yield daemon


def relay_to(daemon: Containerd, path: Path, *, delay: float = 0.0) -> Relay:
    return Relay(path, Path(f"{daemon.address}.ttrpc"), delay=delay)


def words(history: list[Event]) -> list[str]:
    """Return the events as topics, each with the exec that it is about."""
    found = []
    for event in history:
        process = event.body.get("exec_id") or event.body.get("id") or ""
        topic = event.topic.removeprefix("/tasks/")
        found.append(f"{topic} {process}" if process not in ("", event.container) else topic)
    return found


def run_exec(daemon: Containerd, container: str, exec_id: str, status: int) -> None:
    flags = ["--exec-id", exec_id]
    result = daemon.exec(container, "sh", "-c", f"exit {status}", flags=flags)
    assert result.exit_status == status, result


def test_events_wait_for_their_socket_and_come_once_and_in_order(
    daemon: Containerd, events_socket: Path, request: pytest.FixtureRequest
) -> None:
    fault = Fault(daemon, request.node.name)
    with Recorder(daemon) as events, relay_to(daemon, events_socket) as relay, fault.cleaned():
        with daemon.running(*WORK, flags=["--null-io"]) as container:
            events.wait_for(container, "start")
            relay.down()
            run_exec(daemon, container, "one", 3)
            daemon.ctr("task", "pause", container)
            daemon.ctr("task", "resume", container)
            run_exec(daemon, container, "two", 4)
            assert words(events.of(container)) == ["create", "start"]
            fault.strikes()
            relay.up()
            run_exec(daemon, container, "three", 0)
            events.wait_for(container, "delete", process="three")
            relay.down()
            daemon.ctr("task", "kill", "--signal", "SIGTERM", container)
            daemon.wait_status(container, "STOPPED")
            relay.up()
            events.wait_for(container, "exit", process=container, timeout=TIMEOUT)
            assert daemon.delete_task(container) == 5
        wait_until(lambda: events.topics(container)[-1] == "delete")
        history = events.of(container)
    execs = [
        [f"exec-added {name}", f"exec-started {name}", f"exit {name}", f"delete {name}"]
        for name in ("one", "two", "three")
    ]
    assert words(history) == [
        "create",
        "start",
        *execs[0],
        "paused",
        "resumed",
        *execs[1],
        *execs[2],
        "exit",
        "delete",
    ]
    assert [event.exit_status for event in history if event.topic == "/tasks/exit"] == [3, 4, 0, 5]


def test_the_last_events_arrive_though_the_daemon_is_slow_to_answer(
    daemon: Containerd, events_socket: Path
) -> None:
    """It runs `delete` while they are on their way, and that asks the shim to end."""
    with Recorder(daemon) as events, relay_to(daemon, events_socket, delay=0.3):
        container = daemon.new_id()
        result = daemon.run("sh", "-c", "exit 4", container=container)
        assert result.exit_status == 4, result
        events.wait_for(container, "delete", timeout=TIMEOUT)
        assert events.topics(container) == ["create", "start", "exit", "delete"]


def test_exits_and_events_outlive_a_daemon_that_is_killed(
    daemon: Containerd, events_socket: Path, request: pytest.FixtureRequest
) -> None:
    """Of its execs one ends while the daemon is away, one afterwards, and one that nobody waits for."""
    fault = Fault(daemon, request.node.name)
    volume = daemon.directory / "volume"
    volume.mkdir()
    mount = f"type=bind,src={volume},dst=/volume,options=rbind:rw"

    def waits_for(name: str, status: int) -> str:
        loop = f"while [ ! -e /volume/{name} ]; do sleep 0.1; done"
        return f"echo ready; {loop}; echo >/volume/{name}-done; exit {status}"

    relay = relay_to(daemon, events_socket)
    with relay, fault.cleaned(of_another_daemon):
        with daemon.running(*WORK, flags=["--null-io", "--mount", mount]) as container:
            clients = {}
            for name, status in (("away", 7), ("later", 8)):
                flags = ["--exec-id", name]
                arguments = daemon.exec_arguments(container, "sh", "-c", waits_for(name, status), flags=flags)
                clients[name] = daemon.popen(*arguments)
                assert clients[name].stdout.readline() == b"ready\n"  # type: ignore[union-attr]
            arguments = daemon.exec_arguments(
                container, "sh", "-c", waits_for("alone", 9), flags=["--exec-id", "alone", "--detach"]
            )
            daemon.ctr(*arguments)
            relay.down()  # or events would come before anybody listens for them again
            fault.strikes()
            daemon.stop_daemon(kill=True)
            for client in clients.values():
                client.communicate(timeout=TIMEOUT)
                assert client.returncode != 0
            for name in ("away", "alone"):
                (volume / name).touch()
                wait_until((volume / f"{name}-done").exists)
            daemon.start_daemon()
            with Recorder(daemon) as events:
                relay.up()
                assert daemon.task_status(container) == "RUNNING"
                events.wait_for(container, "exit", process="away", timeout=TIMEOUT)
                events.wait_for(container, "exit", process="alone", timeout=TIMEOUT)
                (volume / "later").touch()
                events.wait_for(container, "exit", process="later", timeout=TIMEOUT)
                for name, status in (("away", 7), ("alone", 9), ("later", 8)):
                    result = daemon.ctr("task", "rm", "--exec-id", name, container, check=False)
                    assert result.exit_status == status, result
                run_exec(daemon, container, "new", 6)
                daemon.ctr("task", "kill", "--signal", "SIGTERM", container)
                events.wait_for(container, "exit", process=container, timeout=TIMEOUT)
                assert daemon.delete_task(container) == 5
                wait_until(lambda: events.topics(container)[-1] == "delete")
                history = events.of(container)
        shutil.rmtree(daemon.directory / "fifo")  # the killed clients'
        (daemon.directory / "fifo").mkdir()
    exits = {str(event.body["id"]): event.exit_status for event in history if event.topic == "/tasks/exit"}
    assert exits == {"away": 7, "alone": 9, "later": 8, "new": 6, container: 5}
    assert words(history).count("exit away") == 1
    assert [word for word in words(history) if word.startswith("exit")][-1] == "exit"


def test_vms_that_die_while_the_daemon_is_away_are_told_of_afterwards(
    daemon: Containerd, events_socket: Path, request: pytest.FixtureRequest
) -> None:
    """Each end is told once, with its cause in the log, which nobody read when it was written."""
    fault = Fault(daemon, request.node.name)
    relay = relay_to(daemon, events_socket)
    with relay, fault.cleaned(of_another_daemon), ExitStack() as stack:
        pods = [stack.enter_context(pod_in(daemon, state)) for state in (created, paused, exec_open)]
        vmms = [vmm for pod in pods for vmm in pod.processes("qemu")]
        assert len(vmms) == len(pods)
        offset = daemon.log_size()
        relay.down()
        fault.strikes()
        daemon.stop_daemon(kill=True)
        for vmm in vmms:
            kill(vmm)
        for client in (client for pod in pods for client in pod.waiting):
            client.communicate(timeout=TIMEOUT)
            assert client.returncode != 0
        wait_until(lambda: all(read_process(vmm.pid) is None for vmm in vmms))
        daemon.start_daemon()
        with Recorder(daemon) as events:
            relay.up()
            for pod in pods:
                events.wait_for(pod.container, "exit", process=pod.container, timeout=TIMEOUT)
                daemon.wait_status(pod.container, "STOPPED")
                said = rf"{pod.group}: VM \S+ is gone: QEMU \(pid \d+\) was killed by SIGKILL"
                wait_until(lambda said=said: re.search(said, daemon.log_since(offset, MUCH)) is not None)
                assert daemon.delete_task(pod.container) == pod.status
                events.wait_for(pod.container, "delete", timeout=TIMEOUT)
            histories = [events.of(pod.container) for pod in pods]
    exits = [[event.exit_status for event in told if event.topic == "/tasks/exit"] for told in histories]
    assert exits == [[137], [137], [137, 137]]


def test_shims_that_die_while_the_daemon_is_away_leave_nothing(
    daemon: Containerd, events_socket: Path, request: pytest.FixtureRequest
) -> None:
    fault = Fault(daemon, request.node.name)
    with relay_to(daemon, events_socket), fault.cleaned(of_another_daemon), ExitStack() as stack:
        pods = [stack.enter_context(pod_in(daemon, state)) for state in (stopped, exec_open)]
        shims = [shim_of(daemon, pod.container) for pod in pods]
        fault.strikes()
        daemon.stop_daemon(kill=True)
        for shim in shims:
            kill(shim)
        daemon.start_daemon()
        for pod in pods:
            daemon.wait_status(pod.container, None)


def test_a_daemon_that_dies_in_the_middle_of_a_create_leaves_nothing(
    daemon: Containerd, events_socket: Path, request: pytest.FixtureRequest
) -> None:
    """What it had asked for is undone, and the name is free again.

    containerd 1.6 takes whoever answers for a task that lives, so shim and bundle stayed for ever, without a
    task that anybody could have deleted, and the name could not be used again.
    """
    fault = Fault(daemon, request.node.name)
    container = daemon.new_id("midway")
    arguments = daemon.run_arguments("echo", "again", container=container, flags=["--null-io", "--detach"])
    daemon.runtime.start_from(Start.DIRECT)  # which takes long enough to be interrupted
    try:
        with relay_to(daemon, events_socket), fault.cleaned(of_another_daemon):
            client = daemon.popen(*arguments)
            wait_until(lambda: booting(daemon) != [])
            fault.strikes()
            daemon.stop_daemon(kill=True)
            client.communicate(timeout=TIMEOUT)
            assert client.returncode != 0
            wait_until(lambda: booting(daemon) == [])
            daemon.start_daemon()
            daemon.remove(container)
            assert daemon.task_status(container) is None
    finally:
        daemon.runtime.start_from(Start.TEMPLATE)
    again = daemon.run("echo", "again", container=container)
    assert again.stdout == b"again\n", again
