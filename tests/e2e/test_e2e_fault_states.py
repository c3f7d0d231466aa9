"""Whatever dies, in whatever state a container is: its end is told rightly, and the host is clean.

What only the guest's root can do is done by a neighbour: a second, privileged container of the same group,
and so in the same VM. In most of these states the container itself runs nothing that could, and to a
container it is all the same who ended its VM. A panic could come from the host (a non-maskable interrupt),
but the guest's kernel would have to be told of that, so the VM would not be that of all other tests.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.e2e.test_e2e_crashes import shim_of, wait_until
from tests.e2e.test_e2e_faults import CUT_OFF, HEALTH, KILLER, PANIC, agent_killer, configured
from tests.e2e.test_e2e_faults_host import GREEDY, LITTLE_MEMORY
from tests.e2e.test_e2e_groups import GROUP_KEY
from tests.harness import cgroups
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
    group: str  # whose containers share the VM
    status: int  # that it is to end with
    waiting: "list[subprocess.Popen[bytes]]" = field(default_factory=list)
    neighbour: str = ""

    def arguments(self, *command: str, flags: Sequence[str] = ()) -> list[str]:
        """Return the client's arguments to run the container."""
        annotation = ["--annotation", f"{GROUP_KEY}={self.group}"]
        return self.containerd.run_arguments(*command, container=self.container, flags=[*flags, *annotation])

    def has_neighbour(self) -> None:
        """Start a privileged container in the same VM."""
        self.neighbour = self.containerd.new_id("neighbour")
        flags = ["--detach", "--null-io", "--privileged", "--annotation", f"{GROUP_KEY}={self.group}"]
        self.containerd.ctr(
            *self.containerd.run_arguments("sleep", "1000", container=self.neighbour, flags=flags)
        )

    def neighbour_runs(self, *command: str, stdin: bytes | None = None) -> None:
        """Have the neighbour do what ends the VM, and so perhaps the command before it is answered."""
        self.containerd.exec(self.neighbour, *command, stdin=stdin)

    def processes(self, program: str) -> list[Process]:
        """Return the processes of its VM whose program is called like this."""
        vmm = read_process(self.containerd.task_pid(self.container))
        assert vmm is not None
        match = re.search(r"sandbox-([0-9a-f]{16})", vmm.argv)
        assert match is not None, vmm
        mine = [process for process in processes_of(self.containerd.directory) if match[1] in process.argv]
        return [process for process in mine if Path(process.argv.split()[0]).name.startswith(program)]


def created(pod: Pod) -> None:
    """The client fails after its Create: there is no place for the file that it is to write then."""
    flags = ["--detach", "--null-io", "--pid-file", "/no/such/directory/pid"]
    assert pod.containerd.ctr(*pod.arguments(*WORK, flags=flags), check=False).exit_status != 0
    assert pod.containerd.task_status(pod.container) == "CREATED"


def detached(pod: Pod, *command: str) -> None:
    pod.containerd.ctr(*pod.arguments(*(command or WORK), flags=["--detach", "--null-io"]))


def running(pod: Pod) -> None:
    wait_for_ready(pod, pod.containerd.popen(*pod.arguments(*WORK)))


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
    # The socket of a group's shim is named after the group.
    pod = Pod(containerd, containerd.new_id("fault"), containerd.new_id("group"), KILLED)
    try:
        state(pod)
        yield pod
    finally:
        for client in pod.waiting:
            client.kill()
            client.communicate()
        for container in filter(None, (pod.container, pod.neighbour)):
            containerd.remove(container)
        # Clients that fail leave their fifos.
        shutil.rmtree(containerd.directory / "fifo")
        (containerd.directory / "fifo").mkdir()


@pytest.fixture(params=STATES, ids=lambda state: state.__name__)
def state(request: pytest.FixtureRequest) -> Callable[[Pod], None]:
    chosen: Callable[[Pod], None] = request.param
    return chosen


@dataclass(frozen=True, slots=True)
class Blow:
    """Something that ends a VM."""

    name: str
    strike: Callable[[Pod], None]
    said: str  # in the log, as a regular expression, after "is gone: "
    inside: bool = False  # a neighbour has to do it
    is_silent: bool = False  # only a health check notices
    out_of_memory: bool = False  # of the host

    @contextmanager
    def prepared(self, containerd: Containerd) -> Iterator[None]:
        """Have pods that are created in the block in such a condition that they can be struck."""
        with configured(containerd, 'run_dir = "', HEALTH) if self.is_silent else nullcontext():
            yield


def kill_program(program: str) -> Callable[[Pod], None]:
    def strike(pod: Pod) -> None:
        victims = pod.processes(program)
        assert victims
        for victim in victims:
            kill(victim)

    return strike


def stop_vmm(pod: Pod) -> None:
    (vmm,) = pod.processes("qemu")
    os.kill(vmm.pid, signal.SIGSTOP)


def use_up_the_hosts_memory(pod: Pod) -> None:
    (vmm,) = pod.processes("qemu")
    with cgroups.limited("memory", LITTLE_MEMORY) as group:
        (group / "cgroup.procs").write_text(str(vmm.pid))
        pod.neighbour_runs(*GREEDY)
        wait_until(lambda: read_process(vmm.pid) is None)


QEMU_KILLED = Blow("qemu", kill_program("qemu"), r"QEMU \(pid \d+\) was killed by SIGKILL(?!; it was)")
HUNG = Blow("hung", stop_vmm, r"the guest hangs: its agent did not answer a health check", is_silent=True)
BLOWS = (
    QEMU_KILLED,
    HUNG,
    Blow("virtiofsd", kill_program("virtiofsd"), r"virtiofsd \(pid \d+\) was killed by SIGKILL"),
    Blow(
        "panic",
        lambda pod: pod.neighbour_runs("sh", "-c", PANIC),
        r".*last console lines: .*Kernel panic - not syncing",
        inside=True,
    ),
    Blow(
        "agent",
        lambda pod: pod.neighbour_runs(*agent_killer(pod.neighbour), stdin=KILLER),
        r".*last console lines: .*Attempted to kill init",
        inside=True,
    ),
    Blow(
        "cut-off",
        lambda pod: pod.neighbour_runs("sh", "-c", CUT_OFF),
        r"the guest hangs: its agent did not answer a health check",
        inside=True,
        is_silent=True,
    ),
    Blow(
        "host-oom",
        use_up_the_hosts_memory,
        r"QEMU \(pid \d+\) was killed by SIGKILL; it was the host's OOM killer",
        inside=True,
        out_of_memory=True,
    ),
)


@pytest.mark.parametrize("blow", BLOWS, ids=lambda blow: blow.name)
def test_a_vm_dies_in_any_state(
    containerd: Containerd, events: Recorder, fault: Fault, state: Callable[[Pod], None], blow: Blow
) -> None:
    """What ran has ended by SIGKILL, what had ended keeps its exit status, and the task can be deleted."""
    if blow.out_of_memory and (why := cgroups.missing("memory")):
        pytest.skip(why)
    check_death(containerd, events, fault, state, blow)


def check_death(
    containerd: Containerd, events: Recorder, fault: Fault, state: Callable[[Pod], None], blow: Blow
) -> None:
    """End the VM of a container in this state; see that it is told rightly and that nothing is left."""
    offset = containerd.log_size()
    gone = re.compile(rf"sandbox .* is gone: {blow.said}")
    with blow.prepared(containerd), fault.cleaned(), pod_in(containerd, state) as pod:
        if blow.inside:
            pod.has_neighbour()
        fault.strikes()
        blow.strike(pod)
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
    had_memory = not blow.out_of_memory or state in (created, stopped)
    assert [event.topic for event in history].count("/tasks/oom") == (0 if had_memory else 1)
    assert gone.search(containerd.log_since(offset))


def test_a_shim_dies_in_any_state(
    containerd: Containerd, events: Recorder, fault: Fault, state: Callable[[Pod], None]
) -> None:
    """Its VM dies with it, containerd cleans up by `delete`, and clients get an end.

    containerd announces the exit, once more if the shim had. What had ended before keeps its exit status.
    """
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
    ends = [(event.topic, event.exit_status) for event in history if event.topic.endswith(("exit", "delete"))]
    exits = 2 if state is stopped else 1
    assert ends == [("/tasks/exit", pod.status)] * exits + [("/tasks/delete", pod.status)]
