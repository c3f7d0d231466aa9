"""Whatever dies, in whatever state a container is: its end is told rightly, and the host is clean."""

import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from tests.e2e.test_e2e_crashes import shim_of, wait_until
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Recorder
from tests.harness.faults import Fault
from tests.harness.processes import Process, kill, processes_of, read_process

pytestmark = pytest.mark.usefixtures("vm_runtime")

WORK = ("sh", "-c", "echo ready; sleep 1000")
KILLED = 128 + signal.SIGKILL


@dataclass(slots=True)
class Pod:
    """A container in some state, with the clients that wait for its processes."""

    containerd: Containerd
    container: str
    status: int  # that it is to end with
    waiting: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def processes(self, program: str) -> list[Process]:
        """Return the processes of its VM whose program is called like this."""
        vmm = read_process(self.containerd.task_pid(self.container))
        assert vmm is not None
        match = re.search(r"sandbox-([0-9a-f]{16})", vmm.argv)
        assert match is not None, vmm
        mine = [process for process in processes_of(self.containerd.directory) if match[1] in process.argv]
        return [process for process in mine if program in process.argv.split()[0]]


def created(pod: Pod) -> None:
    """The client fails after its Create: there is no place for the file that it is to write then."""
    flags = ["--detach", "--null-io", "--pid-file", "/no/such/directory/pid"]
    arguments = pod.containerd.run_arguments(*WORK, container=pod.container, flags=flags)
    assert pod.containerd.ctr(*arguments, check=False).exit_status != 0
    assert pod.containerd.task_status(pod.container) == "CREATED"


def detached(pod: Pod, *command: str) -> None:
    flags = ["--detach", "--null-io"]
    arguments = pod.containerd.run_arguments(*(command or WORK), container=pod.container, flags=flags)
    pod.containerd.ctr(*arguments)


def running(pod: Pod) -> None:
    arguments = pod.containerd.run_arguments(*WORK, container=pod.container)
    wait_for_ready(pod, pod.containerd.popen(*arguments))


def paused(pod: Pod) -> None:
    detached(pod)
    pod.containerd.ctr("task", "pause", pod.container)


def exec_open(pod: Pod) -> None:
    detached(pod)
    arguments = pod.containerd.exec_arguments(pod.container, "sh", "-c", "echo ready; exec sleep 1000")
    wait_for_ready(pod, pod.containerd.popen(*arguments))


def stopped(pod: Pod) -> None:
    detached(pod, "sh", "-c", "exit 5")
    pod.containerd.wait_status(pod.container, "STOPPED")
    pod.status = 5


def wait_for_ready(pod: Pod, client: "subprocess.Popen[bytes]") -> None:
    pod.waiting.append(client)
    assert client.stdout is not None
    assert client.stdout.readline() == b"ready\n", client.communicate()


STATES: tuple[Callable[[Pod], None], ...] = (created, running, paused, exec_open, stopped)


@contextmanager
def pod_in(containerd: Containerd, state: Callable[[Pod], None]) -> Iterator[Pod]:
    pod = Pod(containerd, containerd.new_id("fault"), KILLED)
    try:
        state(pod)
        yield pod
    finally:
        for client in pod.waiting:
            client.kill()
            client.communicate()
        containerd.remove(pod.container)
        # Clients that fail leave their fifos.
        shutil.rmtree(containerd.directory / "fifo")
        (containerd.directory / "fifo").mkdir()


@pytest.fixture(params=STATES, ids=lambda state: state.__name__)
def state(request: pytest.FixtureRequest) -> Callable[[Pod], None]:
    chosen: Callable[[Pod], None] = request.param
    return chosen


@pytest.mark.parametrize("program", ["qemu", "virtiofsd"])
def test_a_vm_dies_in_any_state(
    containerd: Containerd,
    events: Recorder,
    fault: Fault,
    state: Callable[[Pod], None],
    program: str,
) -> None:
    """What ran has ended by SIGKILL, what had ended keeps its exit status, and the task can be deleted."""
    offset = containerd.log_size()
    name = "QEMU" if program == "qemu" else "virtiofsd"
    gone = re.compile(rf"sandbox .* is gone: {name} \(pid \d+\) was killed by SIGKILL")
    with fault.cleaned(), pod_in(containerd, state) as pod:
        victims = pod.processes(program)
        assert victims
        fault.strikes()
        for victim in victims:
            kill(victim)
        for client in pod.waiting:
            client.communicate(timeout=TIMEOUT)
            assert client.returncode == KILLED
        if state is running:  # its client has deleted it
            assert containerd.task_status(pod.container) is None
        else:
            # Its end is in the log alone if it had ended before.
            wait_until(lambda: gone.search(containerd.log_since(offset)) is not None)
            containerd.wait_status(pod.container, "STOPPED")
            assert containerd.delete_task(pod.container) == pod.status
    history = events.wait_for(pod.container, "delete")
    exits = [event.exit_status for event in history if event.topic == "/tasks/exit"]
    assert exits == ([KILLED, KILLED] if state is exec_open else [pod.status])
    assert gone.search(containerd.log_since(offset))


def test_a_shim_dies_in_any_state(
    containerd: Containerd, events: Recorder, fault: Fault, state: Callable[[Pod], None]
) -> None:
    """Its VM dies with it, containerd cleans up by `delete`, and clients get an end."""
    with fault.cleaned(), pod_in(containerd, state) as pod:
        vmm = pod.processes("qemu")
        fault.strikes()
        kill(shim_of(containerd, pod.container))
        for client in pod.waiting:
            client.communicate(timeout=TIMEOUT)
            assert client.returncode != 0
        containerd.wait_status(pod.container, None)
        wait_until(lambda: all(read_process(process.pid) is None for process in vmm))
    history = events.wait_for(pod.container, "delete")
    assert [event.topic for event in history].count("/tasks/delete") == 1
