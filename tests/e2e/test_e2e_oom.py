"""A container that wants more memory than it may have: what its clients get to know, and what lives on."""

import json

import pytest

from tests.e2e.test_e2e_faults import client_of
from tests.e2e.test_e2e_groups import Group, group  # noqa: F401 - a fixture
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Event, Recorder
from tests.harness.shim_client import RESOURCES_TYPE, Shim
from ttrpc.status import Code

HELD_MIB = 40
LIMIT = ("--memory-limit", str(32 << 20))
# Reads into one buffer of this size, all of which the kernel has to provide.
GREEDY = ("dd", "if=/dev/zero", "of=/dev/null", "bs=128M", "count=1")

# The same as soon as it is told to.
GREEDY_LATER = ("sh", "-c", f"trap : USR1; echo ready; sleep 1000 & wait; exec {' '.join(GREEDY)}")


def topics_of(events: list[Event]) -> list[str]:
    return [event.topic.removeprefix("/tasks/") for event in events]


def oom_kills(containerd: Containerd, container: str) -> int:
    metrics = json.loads(containerd.ctr("task", "metrics", "--format", "json", container).stdout)
    # A host with cgroup v1 has the first, one with v2 the second.
    found = metrics.get("memory_oom_control") or metrics.get("memory_events") or {}
    return int(found.get("oom_kill", 0))


def test_a_container_that_is_killed_for_want_of_memory(containerd: Containerd, events: Recorder) -> None:
    with containerd.running(*GREEDY, flags=LIMIT) as container:
        told = events.wait_for(container, "exit")
        if containerd.runtime.is_vm:  # runc's shim promises no order
            assert topics_of(told) == ["create", "start", "oom", "exit"]
        assert [event.exit_status for event in told if event.topic == "/tasks/exit"] == [137]
        assert oom_kills(containerd, container) == 1
        assert containerd.delete_task(container) == 137
        told = events.wait_for(container, "delete")
        assert sorted(topics_of(told)) == ["create", "delete", "exit", "oom", "start"]


def test_an_exec_that_is_killed_for_want_of_memory(containerd: Containerd, events: Recorder) -> None:
    with containerd.running(flags=LIMIT) as container:
        for number in (1, 2):
            result = containerd.exec(container, *GREEDY, flags=["--exec-id", f"greedy-{number}"])
            assert result.exit_status == 137, result
            told = events.wait_for(container, "exit", process=f"greedy-{number}")
            if containerd.runtime.is_vm:  # runc's shim promises no order
                assert topics_of(told).count("oom") == number
                last = max(at for at, topic in enumerate(topics_of(told)) if topic == "exit")
                assert topics_of(told)[last - 1] == "oom"
            assert oom_kills(containerd, container) == number
        result = containerd.exec(container, "echo", "alive")
        assert result.stdout == b"alive\n", result
        assert containerd.task_status(container) == "RUNNING"
        containerd.ctr("task", "kill", "--signal", "SIGKILL", container)
        told = events.wait_for(container, "exit", process=container)
        assert topics_of(told).count("oom") == 2


def test_a_kill_of_another_kind_is_no_want_of_memory(containerd: Containerd, events: Recorder) -> None:
    with containerd.running(flags=LIMIT) as container:
        containerd.ctr("task", "kill", "--signal", "SIGKILL", container)
        assert topics_of(events.wait_for(container, "exit")) == ["create", "start", "exit"]
        assert oom_kills(containerd, container) == 0


def test_a_container_without_memory_takes_its_open_execs_along(
    containerd: Containerd, events: Recorder
) -> None:
    with client_of(containerd, *GREEDY_LATER, flags=LIMIT) as (container, client):
        flags = ["--exec-id", "open"]
        arguments = containerd.exec_arguments(
            container, "sh", "-c", "echo ready; exec sleep 1000", flags=flags
        )
        process = containerd.popen(*arguments)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        containerd.ctr("task", "kill", "--signal", "SIGUSR1", container)
        for waiting in (process, client):
            waiting.communicate(timeout=TIMEOUT)
            assert waiting.returncode == 137
    told = events.wait_for(container, "delete")
    if containerd.runtime.is_vm:  # runc's shim promises no order
        ends = [event for event in told if event.topic in ("/tasks/oom", "/tasks/exit")]
        assert topics_of(ends) == ["oom", "exit", "exit"]
        assert [event.body["id"] for event in ends[1:]] == ["open", container]
    assert [event.exit_status for event in told if event.topic == "/tasks/exit"] == [137, 137]
    assert topics_of(told).count("oom") == 1


@pytest.mark.usefixtures("vm_runtime")
def test_a_container_can_run_out_of_memory_while_it_is_paused(
    containerd: Containerd, events: Recorder
) -> None:
    """Its limit is set to less than it holds. Frozen processes can be killed, in version 2 of cgroups."""
    shim = Shim(containerd, containerd.runtime.name)
    try:
        hold = f"dd if=/dev/zero of=/dev/shm/held bs=1M count={HELD_MIB} 2>/dev/null"
        container = shim.create("sh", "-c", f"{hold}; echo ready; sleep 1000")
        shim.start(container)
        shim.must("Pause", id=container)
        resources = json.dumps({"memory": {"limit": HELD_MIB // 4 << 20}}).encode()
        shim.must("Update", id=container, resources={"type_url": RESOURCES_TYPE, "value": resources})
        assert shim.must("Wait", id=container).exit_status == 137  # type: ignore[attr-defined]
        assert shim.call("Resume", id=container).code == Code.FAILED_PRECONDITION
        shim.must("Delete", id=container)
        told = topics_of(events.wait_for(container, "delete"))
        assert told == ["create", "start", "paused", "oom", "exit", "delete"]
    finally:
        shim.close()


def test_who_shares_a_vm_with_a_container_without_memory_lives_on(
    containerd: Containerd,
    events: Recorder,
    group: Group,  # noqa: F811
) -> None:
    limited, neighbour = group.add(*LIMIT), group.add(*LIMIT)
    assert containerd.exec(limited, *GREEDY, flags=["--exec-id", "greedy"]).exit_status == 137
    told = events.wait_for(limited, "exit", process="greedy")
    assert topics_of(told).count("oom") == 1
    assert (oom_kills(containerd, limited), oom_kills(containerd, neighbour)) == (1, 0)
    for member in (limited, neighbour):
        assert containerd.exec(member, "echo", "alive").stdout == b"alive\n"
    assert "oom" not in topics_of(events.of(neighbour))
