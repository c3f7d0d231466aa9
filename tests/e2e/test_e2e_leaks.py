"""A host that has run many containers looks as if it had run none."""

from tests.e2e.conftest import MakeContainerd, NoLeaks
from tests.harness.containerd import Containerd
from tests.harness.events import Recorder
from tests.harness.processes import processes_of

COUNT = 20


def test_twenty_containers_leave_nothing(containerd: Containerd, events: Recorder, no_leaks: NoLeaks) -> None:
    containerd.run("true")  # what the daemon opens once and keeps
    ids = [containerd.new_id("many") for _ in range(COUNT)]
    with no_leaks():
        for number, container in enumerate(ids):
            result = containerd.run("sh", "-c", f"echo {number}; exit {number}", container=container)
            assert (result.stdout, result.exit_status) == (b"%d\n" % number, number), result
    for number, container in enumerate(ids):
        history = events.wait_for(container, "delete")
        assert events.topics(container) == ["create", "start", "exit", "delete"]
        assert history[2].exit_status == number


def test_twenty_execs_leave_nothing(containerd: Containerd, shared: str, no_leaks: NoLeaks) -> None:
    containerd.exec(shared, "true")
    with no_leaks():
        for number in range(COUNT):
            assert containerd.exec(shared, "sh", "-c", f"exit {number}").exit_status == number
    # The shell's own children: what it sleeps in.
    listing = containerd.exec(shared, "ps", "-o", "comm").stdout.decode().split()
    assert sorted(listing) == ["COMMAND", "ps", "sh", "sleep"]


def test_two_harnesses_do_not_meet(
    make_containerd: MakeContainerd, containerd: Containerd, shared: str
) -> None:
    with make_containerd() as other:
        assert other.run("echo", "other").stdout == b"other\n"
        other.ctr(*other.run_arguments("sleep", "1000", container=other.new_id(), flags=["--detach"]))
        tasks = other.ctr("task", "ls").stdout
        assert len(tasks.splitlines()) == 2
        assert shared.encode() not in tasks
        other.close()  # with a container that runs
        assert list(processes_of(other.directory)) == []
        assert not other.directory.exists()
    assert containerd.exec(shared, "echo", "alive").stdout == b"alive\n"
