"""What a client may ask about a running container and do to it."""

import json
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Recorder

QUIET = 1.0  # seconds without output that prove a pause


def test_pids_are_those_of_live_processes_of_the_host(containerd: Containerd, shared: str) -> None:
    lines = containerd.ctr("task", "ps", shared).stdout.decode().splitlines()[1:]
    pids = {int(line.split()[0]) for line in lines}
    assert containerd.task_pid(shared) in pids
    for pid in pids:
        assert Path(f"/proc/{pid}/cmdline").exists()
        assert Path(f"/proc/{pid}/ns/net").exists()


def test_metrics_are_those_of_the_container(containerd: Containerd, shared: str) -> None:
    metrics = json.loads(containerd.ctr("task", "metrics", "--format", "json", shared).stdout)
    memory = metrics["memory"]["usage"]
    # cgroup v1 has an entry with usage and limit, v2 a number.
    usage = memory["usage"] if isinstance(memory, dict) else memory
    assert 0 < usage < 64 << 20  # a shell and a sleep, not a VM
    assert metrics["pids"]["current"] >= 1
    cpu = metrics["cpu"]["usage"]["total"] if "usage" in metrics["cpu"] else metrics["cpu"]["usage_usec"]
    assert cpu > 0


Ticking = tuple[str, subprocess.Popen[bytes]]


@pytest.fixture
def ticking(containerd: Containerd) -> Iterator[Ticking]:
    """A container that keeps writing, and the client that its output is read from."""
    container = containerd.new_id()
    script = "while :; do echo tick; sleep 0.05; done"
    client = containerd.popen(*containerd.run_arguments("sh", "-c", script, container=container))
    assert client.stdout is not None
    try:
        assert os.read(client.stdout.fileno(), 5) == b"tick\n"
        yield container, client
    finally:
        containerd.remove(container)
        if client.returncode is None:
            client.communicate(timeout=TIMEOUT)
        client.__exit__(None, None, None)  # closes the pipes


def test_a_paused_container_stands_still(containerd: Containerd, events: Recorder, ticking: Ticking) -> None:
    container, client = ticking
    assert client.stdout is not None
    output = client.stdout.fileno()
    containerd.ctr("task", "pause", container)
    assert containerd.task_status(container) == "PAUSED"
    while select.select([output], [], [], QUIET)[0]:  # what was written before; ends only if it stands still
        assert len(os.read(output, 4096)) < 4096
    refused = containerd.exec(container, "true")
    assert refused.exit_status != 0
    assert b"paused" in refused.stderr.lower(), refused
    containerd.ctr("task", "resume", container)
    assert containerd.task_status(container) == "RUNNING"
    assert select.select([output], [], [], TIMEOUT)[0]
    assert os.read(output, 4).startswith(b"t")
    events.wait_for(container, "resumed")
    assert events.topics(container)[-2:] == ["paused", "resumed"]


def test_a_paused_container_can_be_killed(containerd: Containerd, ticking: Ticking) -> None:
    container, client = ticking
    containerd.ctr("task", "pause", container)
    containerd.ctr("task", "kill", "--signal", "SIGKILL", container)
    client.communicate(timeout=TIMEOUT)
    assert client.returncode == 137
    assert containerd.task_status(container) is None  # the client deletes what ended


def test_a_running_task_is_not_deleted_without_force(containerd: Containerd, shared: str) -> None:
    result = containerd.ctr("task", "rm", shared, check=False)
    assert result.exit_status != 0
    assert containerd.task_status(shared) == "RUNNING"


def test_a_second_container_of_the_same_name_is_refused(containerd: Containerd, shared: str) -> None:
    result = containerd.run("true", container=shared, flags=[])
    assert result.exit_status != 0
    assert b"already exists" in result.stderr, result
    assert containerd.exec(shared, "echo", "alive").stdout == b"alive\n"


def test_containers_at_once(containerd: Containerd) -> None:
    clients = [
        containerd.popen(
            *containerd.run_arguments(
                "sh", "-c", f"echo {number}; exit {number}", container=containerd.new_id(), flags=["--rm"]
            )
        )
        for number in range(3)
    ]
    ends = [(client.communicate(timeout=2 * TIMEOUT)[0], client.returncode) for client in clients]
    assert ends == [(b"%d\n" % number, number) for number in range(3)]
