"""The life of one container as chance has it: how it is made, what happens to it, how it ends.

Each step knows what must come of it and compares: exit statuses, bytes by their checksums, states, events.
A step is one entry of a table; who adds one says what must be true afterwards, not that nothing failed.
"""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tests.harness.containerd import TIMEOUT, Containerd, HarnessError, Result
from tests.harness.terminal import Terminal

if TYPE_CHECKING:
    from tests.harness.events import Recorder
    from tests.harness.soak import Gate, Journal

# The init process of a container that is visited: each signal has its own answer.
INIT = "trap 'exit 143' TERM; trap 'exit 42' USR1; echo ready; while :; do sleep 1000 & wait $!; done"
OUTPUT = (
    "head -c {size} /dev/urandom >/tmp/{name}; cat /tmp/{name}; sha256sum </tmp/{name} >&2; exit {status}"
)
SIGNALS = {"SIGHUP": 129, "SIGINT": 130, "SIGKILL": 137, "SIGTERM": 143}
LARGEST = 300_000  # bytes of output or input: more than all the buffers on the way
# More than a fifo holds: `ctr` tells nobody of an end of its input that it reads before there is a process.
SMALLEST_INPUT = 140_000  # bytes
LATEST = 1.5  # seconds after which a creation is interrupted


class Host(Protocol):
    """What a life needs of the run that it is a part of."""

    containerd: Containerd
    gate: Gate
    journal: Journal
    recorder: Recorder | None
    restarts: int
    only: str  # part of the names of the lives to choose from

    def count(self, what: str) -> None: ...
    def client_abandoned(self) -> None: ...
    def restart_daemon(self, *, kill: bool) -> None: ...


@dataclass(slots=True)
class Life:
    """One container and the chance that rules it."""

    host: Host
    chance: random.Random
    name: str
    container: str = ""

    @property
    def containerd(self) -> Containerd:
        return self.host.containerd

    def note(self, text: str) -> None:
        self.host.journal.note(self.name, text)

    def hex(self) -> str:
        return f"{self.chance.getrandbits(40):010x}"

    def status(self) -> int:
        return self.chance.choice((0, 1, 9, 77, 255))

    def exec_arguments(self, *command: str, flags: Sequence[str] = ()) -> list[str]:
        return self.containerd.exec_arguments(self.container, *command, flags=flags)


Step = Callable[[Life], None]


def must(condition: bool, what: str, *seen: object) -> None:
    """Raise HarnessError unless `condition`."""
    if not condition:
        raise HarnessError(f"{what}: {' '.join(map(str, seen))}")


def choose(chance: random.Random, table: Mapping[Step, int]) -> Step:
    return chance.choices(list(table), list(table.values()))[0]


def live(life: Life) -> None:
    """Live one life to its end."""
    kinds = {kind: weight for kind, weight in LIVES.items() if life.host.only in kind.__name__}
    _do(life, choose(life.chance, kinds), gated=False)


def visit(life: Life) -> None:
    """Do one step in a container that lives on, which others visit, too: nothing that they would notice."""
    _do(life, choose(life.chance, {step: n for step, n in STEPS.items() if step is not _paused}))


def _do(life: Life, step: Step, *, gated: bool = True) -> None:
    name = step.__name__.lstrip("_")
    life.note(f"{name} ({life.container or 'no container yet'})")
    life.host.count(name)
    if gated:
        with life.host.gate.step():
            step(life)
    else:
        step(life)
    life.note(f"{name}: done")


# Lives


def _attached(life: Life) -> None:
    """A client waits, takes the output and removes the container."""
    size, status = life.chance.randrange(LARGEST), life.status()
    script = OUTPUT.format(size=size, name="out", status=status)
    life.container = life.containerd.new_id("soak")
    restarts = life.host.restarts
    with life.host.gate.step():
        result = life.containerd.run("sh", "-c", script, container=life.container)
        _check_output(result, size, status)
        _check_events(life, status, restarts)


def _with_input(life: Life) -> None:
    data = life.chance.randbytes(life.chance.randrange(SMALLEST_INPUT, LARGEST))
    life.container = life.containerd.new_id("soak")
    with life.host.gate.step():
        result = life.containerd.run("sha256sum", container=life.container, stdin=data)
        expected = f"{hashlib.sha256(data).hexdigest()}  -\n".encode()
        must((result.exit_status, result.stdout) == (0, expected), "input", len(data), expected, result)


def _exits_at_once(life: Life) -> None:
    """Nobody waits for it: its end is told to containerd alone."""
    status = life.status()
    restarts = life.host.restarts
    life.container = life.containerd.new_id("soak")
    with life.host.gate.step():
        _run_detached(life, "sh", "-c", f"exit {status}")
        life.containerd.wait_status(life.container, "STOPPED")
        found = life.containerd.delete_task(life.container)
        must(found == status, "exit status", found, "expected", status)
        life.containerd.ctr("container", "rm", life.container)
        _check_events(life, status, restarts)


def _visited(life: Life) -> None:
    """It runs, things happen to it, and it is ended in one of many ways."""
    restarts = life.host.restarts
    life.container = life.containerd.new_id("soak")
    with life.host.gate.step():
        _run_detached(life, "sh", "-c", INIT)
    for _ in range(life.chance.randrange(1, 5)):
        _do(life, choose(life.chance, STEPS))
    if life.chance.random() < 0.08:
        kill = life.chance.random() < 0.5
        life.note(f"restart of containerd, by SIG{'KILL' if kill else 'TERM'}")
        life.host.count("restart of containerd")
        life.host.restart_daemon(kill=kill)
        must(life.containerd.task_status(life.container) == "RUNNING", "after a restart of containerd")
        _do(life, choose(life.chance, STEPS))
    _do(life, choose(life.chance, ENDS))
    _check_events(life, None, restarts)


def _client_killed_in_create(life: Life) -> None:
    life.container = life.containerd.new_id("soak")
    with life.host.gate.step():
        client = _begin(life)
        time.sleep(life.chance.uniform(0, LATEST))  # the moment is what chance decides
        client.kill()
        client.communicate()
        life.host.client_abandoned()
        _remove(life)


def _deleted_in_create(life: Life) -> None:
    life.container = life.containerd.new_id("soak")
    with life.host.gate.step():
        client = _begin(life)
        time.sleep(life.chance.uniform(0, LATEST))
        life.containerd.ctr("task", "rm", "--force", life.container, check=False)
        _, errors = client.communicate(timeout=TIMEOUT)
        if client.returncode != 0:
            # The container had been made, and was deleted before its start.
            must(b"not found" in errors or b"stopped" in errors or b"closed" in errors, "run", errors)
        _remove(life)


def _begin(life: Life) -> subprocess.Popen[bytes]:
    arguments = life.containerd.run_arguments(
        "sh", "-c", INIT, container=life.container, flags=["--detach", "--null-io"]
    )
    return life.containerd.popen(*arguments)


def _remove(life: Life) -> None:
    """Remove a container whose creation may still be under way, or have been undone."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        life.containerd.remove(life.container)
        listed = life.containerd.ctr("container", "ls", "--quiet").stdout.decode().split()
        if life.containerd.task_status(life.container) is None and life.container not in listed:
            return
        must(time.monotonic() < deadline, "a container cannot be removed", life.container)


def _run_detached(life: Life, *command: str) -> None:
    flags = ["--detach", *life.chance.choice(((), ("--null-io",)))]
    life.containerd.ctr(*life.containerd.run_arguments(*command, container=life.container, flags=flags))


# Steps


def _check_output(result: Result, size: int, status: int) -> None:
    must(result.exit_status == status, "exit status, expected", status, result)
    must(len(result.stdout) == size, "bytes of output, expected", size, "got", len(result.stdout))
    told = result.stderr.decode().split()
    must(told[:1] == [hashlib.sha256(result.stdout).hexdigest()], "checksum of the output, guest:", told)


def _exec_output(life: Life) -> None:
    size, status = life.chance.randrange(LARGEST), life.status()
    script = OUTPUT.format(size=size, name=life.hex(), status=status)
    result = life.containerd.exec(life.container, "sh", "-c", f"{script}")
    _check_output(result, size, status)


def _exec_input(life: Life) -> None:
    data = life.chance.randbytes(life.chance.randrange(SMALLEST_INPUT, LARGEST))
    result = life.containerd.exec(life.container, "sha256sum", stdin=data)
    expected = f"{hashlib.sha256(data).hexdigest()}  -\n".encode()
    must((result.exit_status, result.stdout) == (0, expected), "input", len(data), expected, result)


def _exec_terminal(life: Life) -> None:
    rows, columns, status, word = life.chance.randrange(10, 90), 133, life.status(), life.hex()
    # The size comes by a call of its own, after the start; without one stty says nothing, and ends well.
    sized = f'until [ "$(stty size 2>/dev/null)" = "{rows} {columns}" ]; do :; done; stty size'
    script = f'{sized}; read word; echo "<$word>"; exit {status}'
    arguments = life.exec_arguments("sh", "-c", script, flags=["--tty"])
    with Terminal(life.containerd, *arguments, rows=rows, columns=columns) as terminal:
        terminal.expect(f"{rows} {columns}")
        terminal.send(f"{word}\n")
        terminal.expect(f"<{word}>")
        must(terminal.wait() == status, "exit status behind a terminal, expected", status)


def _exec_killed(life: Life) -> None:
    signal, status = life.chance.choice(list(SIGNALS.items()))
    exec_id = f"e-{life.hex()}"
    client = _ready(life, exec_id)
    life.containerd.ctr("task", "kill", "--exec-id", exec_id, "--signal", signal, life.container)
    output = _end(client)
    must(client.returncode == status, signal, "on an exec ended it with", client.returncode, output)


def _exec_killed_while_it_exits(life: Life) -> None:
    exec_id = f"e-{life.hex()}"
    flags = ["--exec-id", exec_id]
    client = life.containerd.popen(*life.exec_arguments("sh", "-c", "exit 7", flags=flags))
    time.sleep(life.chance.uniform(0, 0.3))
    killed = life.containerd.ctr(
        "task", "kill", "--exec-id", exec_id, "--signal", "SIGKILL", life.container, check=False
    )
    output = _end(client)
    must(client.returncode in (7, 137), "an exec that was killed at its end", client.returncode, output)
    must(killed.exit_status == 0 or client.returncode == 7, "a refused kill had an effect", killed)


def _exec_of_killed_client(life: Life) -> None:
    """Its process goes on until somebody else ends it, and deletes it."""
    exec_id = f"e-{life.hex()}"
    client = _ready(life, exec_id)
    client.kill()
    client.communicate()
    life.host.client_abandoned()
    life.containerd.ctr("task", "kill", "--exec-id", exec_id, "--signal", "SIGKILL", life.container)
    _delete_exec(life, exec_id, 137)


def _exec_detached(life: Life) -> None:
    exec_id, status = f"e-{life.hex()}", life.status()
    flags = ["--exec-id", exec_id, "--detach"]
    life.containerd.ctr(*life.exec_arguments("sh", "-c", f"exit {status}", flags=flags))
    life.host.client_abandoned()
    _delete_exec(life, exec_id, status)


def _delete_exec(life: Life, exec_id: str, status: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while True:
        arguments = ("task", "rm", "--exec-id", exec_id, life.container)
        result = life.containerd.ctr(*arguments, check=False)
        if b"must be deleted" not in result.stderr and b"running" not in result.stderr:
            break
        must(time.monotonic() < deadline, f"exec {exec_id} does not end", result)
    must(result.exit_status == status, "exec deleted with, expected", status, result)


def _paused(life: Life) -> None:
    word = life.hex()
    life.containerd.ctr("task", "pause", life.container)
    must(life.containerd.task_status(life.container) == "PAUSED", "paused")
    if life.chance.random() < 0.5:
        refused = life.containerd.ctr("task", "pause", life.container, check=False)
        must(refused.exit_status != 0, "a second pause", refused)
    life.containerd.ctr("task", "resume", life.container)
    result = life.containerd.exec(life.container, "echo", word)
    must(result.stdout == f"{word}\n".encode(), "after a pause", result)


def _burst(life: Life) -> None:
    clients = []
    for number in range(life.chance.randrange(3, 7)):
        words = (f"{number}-{life.hex()}", life.status())
        script = f"echo {words[0]}; exit {words[1]}"
        clients.append((words, life.containerd.popen(*life.exec_arguments("sh", "-c", script))))
    for (word, status), client in clients:
        output = _end(client)
        must((output[0], client.returncode) == (f"{word}\n".encode(), status), "burst", word, status, output)


def _metrics(life: Life) -> None:
    text = life.containerd.ctr("task", "metrics", life.container).stdout
    must(life.container.encode() in text, "metrics", text)
    life.containerd.ctr("task", "ps", life.container)


def _missing_program(life: Life) -> None:
    result = life.containerd.exec(life.container, f"no-{life.hex()}")
    must(result.exit_status != 0 and b"not found" in result.stderr, "a program that is not there", result)


def _ready(life: Life, exec_id: str) -> subprocess.Popen[bytes]:
    flags = ["--exec-id", exec_id]
    client = life.containerd.popen(
        *life.exec_arguments("sh", "-c", "echo ready; exec sleep 1000", flags=flags)
    )
    assert client.stdout is not None
    line = client.stdout.readline()
    if line != b"ready\n":
        raise HarnessError(f"exec {exec_id} said {line!r}: {_end(client)}")
    return client


def _end(client: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """Wait for a client's end; one that does not end is killed, and a failure."""
    try:
        return client.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        client.kill()
        raise HarnessError(f"no end after {TIMEOUT} s: {client.args!r}: {client.communicate()}") from None


# Ends. Each deletes the task and the container.


def _signalled(life: Life, *flags: str, status: int) -> None:
    life.containerd.ctr("task", "kill", *flags, life.container)
    life.containerd.wait_status(life.container, "STOPPED")
    found = life.containerd.delete_task(life.container)
    must(found == status, "exit status after", *flags, "is", found, "and not", status)
    life.containerd.ctr("container", "rm", life.container)


def _ended_by_sigterm(life: Life) -> None:
    _signalled(life, "--signal", "SIGTERM", status=143)


def _ended_by_sigkill(life: Life) -> None:
    _signalled(life, "--signal", "SIGKILL", status=137)


def _ended_by_killing_all(life: Life) -> None:
    _signalled(life, "--all", "--signal", "SIGKILL", status=137)


def _ended_by_itself(life: Life) -> None:
    _signalled(life, "--signal", "SIGUSR1", status=42)


def _deleted_by_force(life: Life) -> None:
    found = life.containerd.delete_task(life.container, "--force")
    must(found == 137, "exit status of what was deleted by force", found)
    life.containerd.ctr("container", "rm", life.container)


def _deleted_while_paused(life: Life) -> None:
    life.containerd.ctr("task", "pause", life.container)
    _deleted_by_force(life)


def _deleted_with_open_execs(life: Life) -> None:
    clients = [_ready(life, f"e-{life.hex()}") for _ in range(2)]
    _deleted_by_force(life)
    for client in clients:
        output = _end(client)
        must(client.returncode != 0, "an exec of a deleted container", output)
        life.host.client_abandoned()  # it found no task to delete its exec from


def _deleted_twice_at_once(life: Life) -> None:
    both = [life.containerd.popen("task", "rm", "--force", life.container) for _ in range(2)]
    ends = [(_end(client)[1], client.returncode) for client in both]
    must(0 in [status for _, status in ends], "two deletes", ends)
    must(all(status == 0 or b"not found" in errors for errors, status in ends), "two deletes", ends)
    life.containerd.ctr("container", "rm", life.container)


def _check_events(life: Life, status: int | None, restarts: int) -> None:
    """Each event came once, in order. Of the time in which containerd was away the recorder knows nothing."""
    recorder = life.host.recorder
    if recorder is None or life.host.restarts != restarts:
        return
    with suppress(HarnessError):
        recorder.wait_for(life.container, "delete")
    if life.host.restarts != restarts:
        return
    told = [event for event in recorder.of(life.container) if event.body.get("id") in (None, life.container)]
    topics = [event.topic.removeprefix("/tasks/") for event in told]
    kept = [topic for topic in topics if re.fullmatch("create|start|exit|delete", topic)]
    must(kept == ["create", "start", "exit", "delete"], "events", told)
    if status is not None:
        must([event.exit_status for event in told if event.topic == "/tasks/exit"] == [status], "exit", told)


LIVES: Mapping[Step, int] = {
    _attached: 3,
    _with_input: 2,
    _exits_at_once: 5,
    _visited: 9,
    _client_killed_in_create: 1,
    _deleted_in_create: 1,
}
STEPS: Mapping[Step, int] = {
    _exec_output: 4,
    _exec_input: 3,
    _exec_terminal: 2,
    _exec_killed: 3,
    _exec_killed_while_it_exits: 3,
    _exec_of_killed_client: 2,
    _exec_detached: 3,
    _paused: 2,
    _burst: 2,
    _metrics: 1,
    _missing_program: 1,
}
ENDS: Mapping[Step, int] = {
    _ended_by_sigterm: 2,
    _ended_by_sigkill: 2,
    _ended_by_killing_all: 1,
    _ended_by_itself: 2,
    _deleted_by_force: 2,
    _deleted_while_paused: 1,
    _deleted_with_open_execs: 2,
    _deleted_twice_at_once: 1,
}
