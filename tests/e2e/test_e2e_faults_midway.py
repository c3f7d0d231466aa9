"""Something dies in the middle of a Create or a Delete, or while another fault is there already."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_e2e_crashes import shim_of, wait_until
from tests.e2e.test_e2e_fault_states import exec_open, pod_in, stopped
from tests.e2e.test_e2e_faults import configured
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Recorder
from tests.harness.faults import Fault
from tests.harness.processes import Process, kill, read_process
from tests.harness.runtimes import Start
from vc.hypervisor.children import descendants

pytestmark = pytest.mark.usefixtures("vm_runtime")

NOT_BOOTED = r"VM \S+ did not boot after [0-9.]+ s:"
KILLED = r"\(pid \d+\) was killed by SIGKILL.*; last console lines: \S"
TOLD_OF_CREATE = {
    "qemu": f"{NOT_BOOTED} QEMU {KILLED}",
    "virtiofsd": f"{NOT_BOOTED} virtiofsd {KILLED}",
    "shim": "ttrpc: closed",
}


@pytest.fixture
def slow_create(containerd: Containerd) -> Iterator[None]:
    """Have pods boot, which takes long enough to be interrupted, with a kernel that says how far it is."""
    containerd.runtime.start_from(Start.DIRECT)
    try:
        with configured(containerd, "enable_debug = false", "enable_debug = true"):
            yield
    finally:
        containerd.runtime.start_from(Start.TEMPLATE)


def processes_below(shim: Process, program: str) -> list[Process]:
    """Return the shim's processes whose program is called like this, or the shim itself."""
    if program == "shim":
        return [shim]
    found = filter(None, map(read_process, descendants(shim.pid)))
    return [process for process in found if Path(process.argv.split()[0]).name.startswith(program)]


@pytest.mark.usefixtures("slow_create")
@pytest.mark.parametrize("program", TOLD_OF_CREATE)
def test_what_dies_while_a_container_is_created_is_told_to_the_client(
    containerd: Containerd, events: Recorder, fault: Fault, program: str
) -> None:
    """The guest boots meanwhile and has printed something: its last lines are told as well."""
    offset = containerd.log_size()
    container = containerd.new_id("midway")
    with fault.cleaned():
        flags = ["--detach", "--null-io"]
        client = containerd.popen(*containerd.run_arguments("true", container=container, flags=flags))
        wait_until(lambda: "vmconsole: " in containerd.log_since(offset))
        victims = processes_below(shim_of(containerd, container), program)
        assert victims
        fault.strikes()
        for victim in victims:
            kill(victim)
        _, errors = client.communicate(timeout=TIMEOUT)
        assert client.returncode != 0
        assert re.search(TOLD_OF_CREATE[program], errors.decode()), errors
        containerd.ctr("container", "rm", container)
        assert containerd.task_status(container) is None
    assert events.topics(container) == []  # there never was a task


def test_a_shim_that_is_killed_in_the_middle_of_a_delete_leaves_nothing(
    containerd: Containerd, events: Recorder, fault: Fault
) -> None:
    """The VM, which hangs and so takes a while to end, goes with it. The exit status stays what it was."""
    with fault.cleaned(), pod_in(containerd, stopped) as pod:
        offset = containerd.log_size()
        shim = shim_of(containerd, pod.container)
        (vmm,) = pod.processes("qemu")
        os.kill(vmm.pid, signal.SIGSTOP)
        client = containerd.popen("task", "rm", pod.container)
        wait_until(lambda: re.search(r"sandbox \S+ is to end", containerd.log_since(offset)) is not None)
        fault.strikes()
        kill(shim)
        client.communicate(timeout=TIMEOUT)
        containerd.wait_status(pod.container, None)
    history = events.wait_for(pod.container, "delete")
    ends = [(event.topic, event.exit_status) for event in history[2:]]
    assert ends == [("/tasks/exit", 5), ("/tasks/exit", 5), ("/tasks/delete", 5)]


def test_a_vm_that_hangs_does_not_outlive_its_shim(
    containerd: Containerd, events: Recorder, fault: Fault
) -> None:
    with fault.cleaned(), pod_in(containerd, exec_open) as pod:
        (vmm,) = pod.processes("qemu")
        os.kill(vmm.pid, signal.SIGSTOP)
        fault.strikes()
        kill(shim_of(containerd, pod.container))
        for client in pod.waiting:
            client.communicate(timeout=TIMEOUT)
            assert client.returncode != 0
        containerd.wait_status(pod.container, None)
        wait_until(lambda: read_process(vmm.pid) is None)
    history = events.wait_for(pod.container, "delete")
    assert [event.exit_status for event in history if event.topic.endswith(("exit", "delete"))] == [137, 137]
