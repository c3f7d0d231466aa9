"""Containers that say they belong together share one shim and one machine, whoever comes and goes first."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import NoLeaks
from tests.e2e.test_e2e_crashes import forget_fifos, shim_of, wait_until
from tests.harness.containerd import Containerd
from tests.harness.events import Recorder
from tests.harness.leaks import shim_socket
from tests.harness.processes import Process, kill, read_process
from vc.hypervisor.children import descendants
from vc.storage.mounts import mount, unmount_below

# containerd: cmd/containerd-shim-runc-v2/manager
GROUP_KEY = "io.containerd.runc.v2.group"


class Group:
    """Containers of one group."""

    def __init__(self, containerd: Containerd) -> None:
        self.containerd = containerd
        self.name = containerd.new_id("group")  # the shim's socket has this name
        self.members: list[str] = []

    def add(self, *more_flags: str) -> str:
        member = self.containerd.new_id("member")
        self.members.append(member)
        script = "trap 'exit 143' TERM; while :; do sleep 1000 & wait $!; done"
        flags = ["--detach", "--annotation", f"{GROUP_KEY}={self.name}", *more_flags]
        self.containerd.ctr(*self.containerd.run_arguments("sh", "-c", script, container=member, flags=flags))
        return member

    def machine_of(self, member: str) -> bytes:
        return self.containerd.exec(member, "cat", "/proc/sys/kernel/random/boot_id").stdout

    def remove(self) -> None:
        for member in self.members:
            self.containerd.remove(member)


@pytest.fixture
def group(containerd: Containerd, no_leaks: NoLeaks) -> Iterator[Group]:
    with no_leaks():
        group = Group(containerd)
        try:
            yield group
        finally:
            group.remove()
            if not containerd.runtime.is_vm:
                shim_socket(containerd, group.name).unlink(missing_ok=True)  # runc's shim of 2.x leaves it


def address_of(containerd: Containerd, container: str) -> str:
    """Return the address that containerd itself goes by: what it noted, or what the shim wrote for it."""
    state = containerd.directory / "state" / "io.containerd.runtime.v2.task" / containerd.namespace
    noted = Path(state, container, "bootstrap.json")
    if noted.exists():
        return str(json.loads(noted.read_text())["address"])
    return Path(state, container, "address").read_text()


def test_the_containers_of_a_group_share_one_shim_and_one_machine(
    containerd: Containerd, events: Recorder, group: Group
) -> None:
    first, second = group.add(), group.add()
    assert address_of(containerd, first) == address_of(containerd, second)
    machine = group.machine_of(first)
    assert group.machine_of(second) == machine
    if containerd.runtime.is_vm:
        assert containerd.task_pid(first) == containerd.task_pid(second)
    # Who made the machine goes first; the others stay, and another comes.
    containerd.ctr("task", "kill", "--signal", "SIGTERM", first)
    events.wait_for(first, "exit", process=first)
    assert containerd.delete_task(first) == 143
    third = group.add()
    assert [group.machine_of(member) for member in (second, third)] == [machine, machine]
    for member in (second, third):
        assert containerd.delete_task(member, "--force") == 137
    for member in (first, second, third):
        events.wait_for(member, "delete")
        topics = [event.topic for event in events.of(member) if event.body.get("id", member) == member]
        topics = [topic.removeprefix("/tasks/") for topic in topics if "exec" not in topic]
        assert topics == ["create", "start", "exit", "delete"]


@pytest.mark.usefixtures("vm_runtime")
def test_the_shim_of_a_group_that_is_killed_takes_all_its_containers_with_it(
    containerd: Containerd, events: Recorder, group: Group
) -> None:
    """Not on runc, whose containers outlive their shim."""
    members = [group.add(), group.add()]
    kill(shim_of(containerd, members[0]))
    for member in members:
        told = events.wait_for(member, "delete")
        assert [event.exit_status for event in told[-2:]] == [137, 137]
        assert containerd.task_status(member) is None
    forget_fifos(containerd)


def held_of_removed(shim: Process) -> int:
    """Count what a shim's virtiofsd keeps open though it has no place in the share any more.

    What was removed says so; the root of a file system that is mounted nowhere any more is a "/".
    """
    found = 0
    for pid in descendants(shim.pid):
        process = read_process(pid)
        if process is None or not process.argv.split()[0].endswith("virtiofsd"):
            continue
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(descriptor.readlink())
            except FileNotFoundError:  # closed meanwhile
                continue
            found += target == "/" or target.endswith(" (deleted)")
    return found


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system with a file, mounted below a directory of its own."""
    place = tmp_path / "mounted"
    place.mkdir()
    mount("tmpfs", place, "tmpfs", 0)
    try:
        (place / "file").touch()
        yield place
    finally:
        unmount_below(place)


@pytest.mark.usefixtures("vm_runtime")
def test_members_that_come_and_go_leave_nothing_open_in_virtiofsd(
    containerd: Containerd, group: Group, mounted: Path
) -> None:
    """A container in a crash loop took virtiofsd to its limit of descriptors (kata-containers 6455).

    The guest remembers entries of the share that the host has removed, and virtiofsd keeps each of them open,
    and with it the file system that was mounted there: two for a container, and one for each volume.
    """
    shim = shim_of(containerd, group.add())
    before = held_of_removed(shim)
    assert before  # at least virtiofsd's own root
    for _ in range(3):
        member = group.add("--mount", f"type=bind,src={mounted.parent},dst=/volume,options=rbind:rw")
        # What is mounted below the volume is there, although the member before has taken its own away.
        assert containerd.exec(member, "ls", f"/volume/{mounted.name}").stdout == b"file\n"
        assert held_of_removed(shim) == before
        containerd.remove(member)
        # The guest tells what it has forgotten when it has time, and nothing says when it has.
        wait_until(lambda: held_of_removed(shim) == before)


@pytest.mark.usefixtures("vm_runtime")
def test_what_happens_after_the_first_member_has_left_is_in_the_log(
    containerd: Containerd, group: Group
) -> None:
    """containerd reads a fifo for each task, and lets go of that of a task which is gone."""
    first, second = group.add(), group.add()
    containerd.remove(first)
    offset = containerd.log_size()
    vmm = read_process(containerd.task_pid(second))
    assert vmm is not None
    kill(vmm)
    containerd.wait_status(second, "STOPPED")
    gone = re.compile(r"sandbox .* is gone: QEMU \(pid \d+\) was killed by SIGKILL")
    wait_until(lambda: gone.search(containerd.log_since(offset)) is not None)
