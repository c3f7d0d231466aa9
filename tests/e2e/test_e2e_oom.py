"""A container that wants more memory than it may have: what its clients get to know, and what lives on."""

import json

from tests.harness.containerd import Containerd
from tests.harness.events import Event, Recorder

LIMIT = ("--memory-limit", str(32 << 20))
# Reads into one buffer of this size, all of which the kernel has to provide.
GREEDY = ("dd", "if=/dev/zero", "of=/dev/null", "bs=128M", "count=1")


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
